// The pages, and how one gets to another.

import { api, Problem } from "./api.js"
import { html, render } from "./html.js"
import { setUp, signIn, signUp } from "./pages/access.js"
import { account } from "./pages/account.js"
import { otherLanguage, say, words } from "./words.js"

const pages = { "/": account, "/set-up": setUp, "/sign-in": signIn, "/sign-up": signUp }
const main = document.querySelector("main")
let wanted = "/" // after signing in

// Whether to ask the server for the account at all: the cookie itself is hidden from scripts.
const signedIn = () => localStorage.getItem("signed-in") === "yes"

const here = () => location.pathname.replace(/(.)\/$/, "$1")
const address = () => location.pathname + location.search + location.hash

async function show() {
  const path = here()
  if (path === "/" && !signedIn()) {
    wanted = address()
    return go("/sign-in", "replaceState")
  }
  const content = await Promise.resolve(pages[path]({ enter })).catch((problem) => {
    if (!(problem instanceof Problem)) throw problem
    return problem.status !== 401 && html`<h1>${say(problem)}</h1>`
  })
  if (!content || path !== here()) return // somebody went elsewhere meanwhile
  navigation(path)
  render(main, content)
  document.title = `${main.querySelector("h1").textContent} · VideoFly`
}

function go(path, how = "pushState") {
  history[how](null, "", path)
  return show().then(() => how === "pushState" && main.focus())
}

function enter() {
  localStorage.setItem("signed-in", "yes")
  go(wanted)
}

function leave(next) {
  if (!signedIn()) return
  localStorage.removeItem("signed-in")
  wanted = next
  go("/sign-in")
}

function navigation(path) {
  const nav = document.querySelector("nav")
  nav.setAttribute("aria-label", words.main)
  document.querySelector(".skip").textContent = words.skip
  render(nav, html`
    <a href="/docs">${words.docs}</a>
    <button class="plain" lang=${words.otherCode} @click=${otherLanguage}>${words.other}</button>
    ${path === "/" && html`<button class="plain" @click=${signOut}>${words.signOut}</button>`}`)
}

async function signOut() {
  await api.post("/api/auth/sign-out").then(() => leave("/"), (problem) => alert(say(problem)))
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("a")
  if (link?.className === "skip") { // by hand: a set-up link has its token where #main would go
    event.preventDefault()
    main.focus()
  }
  const ours = link && link.origin === location.origin && link.pathname in pages && !link.hash
  if (!ours || event.button || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return
  event.preventDefault()
  go(link.pathname)
})
addEventListener("popstate", show)
addEventListener("signed-out", () => leave(address()))
show()
