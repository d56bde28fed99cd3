// Where the server's addresses begin: nowhere, or at the path that a proxy keeps.

export const home = new URL(import.meta.url).pathname.split("/static/")[0]
