// The API's manual, from the document that the server makes of its own code.

import { home } from "./home.js"

const dark = matchMedia("(prefers-color-scheme: dark)")
const follow = () => document.documentElement.classList.toggle("dark-mode", dark.matches) // Swagger UI's name for it

dark.addEventListener("change", follow)
follow()

window.SwaggerUIBundle({ url: `${home}/openapi.json`, dom_id: "#docs", deepLinking: true, tryItOutEnabled: true })
