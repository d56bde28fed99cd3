// The pages, and how one gets to another.

import { api, Problem } from "./api.js"
import { html, render } from "./html.js"
import { otherLanguage, say, words } from "./words.js"

const pages = { "/": home, "/set-up": setUp, "/sign-in": signIn, "/sign-up": signUp }
const main = document.querySelector("main")

async function show() {
  try {
    render(main, await pages[location.pathname]())
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem
    if (problem.status === 401) return go("/sign-in")
    render(main, html`<h1>${say(problem)}</h1>`)
  }
  document.title = `${main.querySelector("h1").textContent} · VideoFly`
}

function go(path) {
  history.pushState(null, "", path)
  show().then(() => main.focus())
}

function navigation(signedIn) {
  const nav = document.querySelector("nav")
  nav.setAttribute("aria-label", words.main)
  document.querySelector(".skip").textContent = words.skip
  render(nav, html`
    <a href="/docs">${words.docs}</a>
    <button class="plain" @click=${otherLanguage}>${words.other}</button>
    ${signedIn && html`<button class="plain" @click=${signOut}>${words.signOut}</button>`}`)
}

async function signOut() {
  await api.post("/api/auth/sign-out")
  go("/sign-in")
}

// A form that sends what is in it, says what is wrong with it, and cannot be sent twice at once.
function form(button, fields, send) {
  return html`
    <form class="stack" @submit=${submit}>
      ${fields}
      <p class="wrong" role="alert" hidden></p>
      <button>${button}</button>
    </form>`

  async function submit(event) {
    event.preventDefault()
    const { target } = event, pressed = target.querySelector("button"), wrong = target.querySelector(".wrong")
    pressed.disabled = true
    wrong.hidden = true
    try {
      await send(Object.fromEntries(new FormData(target)))
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem
      wrong.textContent = say(problem)
      wrong.hidden = false
    } finally {
      pressed.disabled = false
    }
  }
}

function emailField() {
  return html`<label>${words.email} <input name="email" type="email" required maxlength="254" autocomplete="username"></label>`
}

function newPasswordField() {
  return html`
    <label>${words.password}
      <input name="password" type="password" required minlength="8" maxlength="256" autocomplete="new-password" aria-describedby="rule">
      <span class="hint" id="rule">${words.passwordHint}</span></label>`
}

function setUp() {
  navigation(false)
  const token = location.hash.slice(1) // after the #, where no server's log sees it
  if (!token) return html`<h1>${words.setUp}</h1><p>${words.setUpNoToken}</p>`
  return html`
    <div class="stack"><h1>${words.setUp}</h1><p>${words.setUpHint}</p>
    ${form(words.setUpButton, [emailField(), newPasswordField()], async (given) => {
      await api.post("/api/auth/set-up", { token, ...given })
      go("/")
    })}</div>`
}

function signIn() {
  navigation(false)
  return html`
    <div class="stack"><h1>${words.signIn}</h1>
    ${form(words.signIn, [emailField(), html`
      <label>${words.password} <input name="password" type="password" required maxlength="256" autocomplete="current-password"></label>`,
    ], async (given) => {
      await api.post("/api/auth/sign-in", given)
      go("/")
    })}
    <p>${words.noAccount} <a href="/sign-up">${words.signUp}</a></p></div>`
}

function signUp() {
  navigation(false)
  const invite = location.hash.slice(1) || null
  return html`
    <div class="stack"><h1>${words.signUp}</h1>
    ${form(words.signUp, [emailField(), newPasswordField()], async (given) => {
      await api.post("/api/auth/sign-up", { ...given, invite })
      go("/")
    })}
    <p>${words.haveAccount} <a href="/sign-in">${words.signIn}</a></p></div>`
}

async function home() {
  const [user, balance] = await Promise.all([api.get("/api/v1/user/me"), api.get("/api/v1/credit/balance")])
  navigation(true)
  const facts = { available: balance.availableCredits, frozen: balance.frozenCredits, used: balance.usedCredits, soon: balance.expiringSoon }
  const keys = html`<section class="card stack"></section>`.firstChild
  await showKeys(keys)
  return html`
    <div class="stack"><h1>${words.home}</h1><p>${user.email}</p>
      <section class="card stack" aria-label=${words.credits}><h2>${words.credits}</h2>
        <dl class="facts">${Object.entries(facts).map(([name, n]) => html`<div><dt>${words[name]}</dt><dd>${n}</dd></div>`)}</dl>
      </section>
      ${keys}</div>`
}

async function showKeys(place, made) {
  const { keys } = await api.get("/api/v1/keys")
  render(place, html`
    <h2>${words.keys}</h2>
    ${made && html`<p>${words.keyOnce}</p><code class="secret">${made}</code>`}
    ${keys.length === 0 && html`<p>${words.noKeys} ${words.keyUse}</p>`}
    <ul class="stack">${keys.map((key) => html`<li>${key.name} <code>vf_…${key.hint}</code>
      <button class="plain" aria-label=${`${words.revokeKey} ${key.name}`} @click=${() => revoke(key)}>${words.revoke}</button></li>`)}</ul>
    ${form(words.makeKey, html`<label>${words.keyName} <input name="name" required maxlength="100"></label>`, async (given) => {
      await showKeys(place, (await api.post("/api/v1/keys", given)).apiKey)
    })}`)

  async function revoke(key) {
    await api.delete(`/api/v1/keys/${key.id}`)
    await showKeys(place)
  }
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("a")
  const ours = link && link.origin === location.origin && link.pathname in pages && !link.hash
  if (!ours || event.button || event.metaKey || event.ctrlKey || event.shiftKey) return
  event.preventDefault()
  go(link.pathname)
})
addEventListener("popstate", show)
show()
