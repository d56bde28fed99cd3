// Every request the page makes.

import { home } from "./home.js"

export class Problem extends Error {
  constructor(status, { code = "", message = "", details = {} } = {}) {
    super(message)
    Object.assign(this, { status, code, details })
  }
}

export const api = {
  get: (path) => send("GET", path),
  post: (path, body = {}, headers = {}) => send("POST", path, body, headers),
  delete: (path) => send("DELETE", path),
}

async function send(method, path, body, headers = {}) {
  const answer = await fetch(home + path, {
    method,
    headers: body ? { "Content-Type": "application/json", ...headers } : headers,
    body: body && JSON.stringify(body),
  }).catch(() => { throw new Problem(0, { code: "offline" }) })
  const content = await answer.json().catch(() => null)
  if (answer.status === 401 && path !== "/api/auth/sign-in") dispatchEvent(new Event("signed-out"))
  if (!answer.ok) throw new Problem(answer.status, content?.error ?? { code: "offline" })
  return content?.data
}
