// The pages, and how one gets to another.

import { api, Problem } from "./api.js"
import { home } from "./home.js"
import { html, render } from "./html.js"
import { setUp, signIn, signUp } from "./pages/access.js"
import { account } from "./pages/account.js"
import { checkout } from "./pages/checkout.js"
import { credits } from "./pages/credits.js"
import { sandbox } from "./pages/sandbox.js"
import { otherLanguage, say, words } from "./words.js"

const outside = { "/set-up": setUp, "/sign-in": signIn, "/sign-up": signUp }
const inside = { "/": account, "/credits": credits, "/sandbox": sandbox, "/sandbox/checkout": checkout }
const pages = { ...outside, ...inside }
const main = document.querySelector("main")
let wanted = "/" // after signing in
let visit = new AbortController() // ends with the page's being shown
let acted // the promise of whether payments are acted out here

// Whether to ask the server for the account at all: the cookie itself is hidden from scripts.
const signedIn = () => localStorage.getItem("signed-in") === "yes"

const pathOf = ({ pathname }) => pathname.slice(home.length).replace(/(.)\/$/, "$1") || "/"
const here = () => pathOf(location)
const address = () => here() + location.search + location.hash

async function show() {
  const path = here()
  visit.abort()
  const { signal } = visit = new AbortController()
  if (path in inside && !signedIn()) {
    wanted = address()
    return go("/sign-in", "replaceState")
  }
  const page = Promise.resolve(pages[path]({ enter, signal })).catch((problem) => {
    if (!(problem instanceof Problem)) throw problem
    return problem.status !== 401 && html`<h1>${say(problem)}</h1>`
  })
  const [content, isSandbox] = await Promise.all([page, path in inside && actedOut()])
  if (!content || signal.aborted) return // somebody went elsewhere meanwhile
  navigation(path, isSandbox)
  render(main, content)
  document.title = `${main.querySelector("h1").textContent} · VideoFly`
}

function actedOut() {
  acted ??= api.get("/api/v1/user/billing").then(({ isSandbox }) => isSandbox, () => { acted = undefined })
  return acted
}

function go(path, how = "pushState") {
  history[how](null, "", home + path)
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

function navigation(path, isSandbox) {
  const nav = document.querySelector("nav")
  nav.setAttribute("aria-label", words.main)
  document.querySelector(".skip").textContent = words.skip
  render(nav, html`
    ${path in inside && link("/credits", words.credits)}
    ${isSandbox && link("/sandbox", words.sandbox)}
    <a href="/docs">${words.docs}</a>
    <button class="plain" lang=${words.otherCode} @click=${otherLanguage}>${words.other}</button>
    ${path in inside && html`<button class="plain" @click=${signOut}>${words.signOut}</button>`}`)

  function link(to, text) {
    return html`<a href=${to} aria-current=${to === path && "page"}>${text}</a>`
  }
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
  const ours = link && link.origin === location.origin && pathOf(link) in pages && !link.hash
  if (!ours || event.button || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return
  event.preventDefault()
  go(pathOf(link))
})
addEventListener("popstate", show)
addEventListener("pageshow", ({ persisted }) => persisted && show()) // back from paying elsewhere
addEventListener("signed-out", () => leave(address()))
show()
