// Ways in.  Secrets of links come after the #, where no server's log sees them.

import { api } from "../api.js"
import { emailField, form, newPasswordField, passwordField } from "../form.js"
import { html } from "../html.js"
import { words } from "../words.js"

export function setUp({ enter }) {
  const token = location.hash.slice(1)
  if (!token) return gate(words.setUp, html`<p>${words.setUpNoToken}</p>`)
  return gate(words.setUp, [
    html`<p>${words.setUpHint}</p>`,
    form(words.setUpButton, [emailField(), newPasswordField()], async (given) => {
      await api.post("/api/auth/set-up", { token, ...given })
      enter()
    }),
  ])
}

export function signIn({ enter }) {
  return gate(words.signIn, [
    form(words.signIn, [emailField(), passwordField()], async (given) => {
      await api.post("/api/auth/sign-in", given)
      enter()
    }),
    html`<p class="hint">${words.noAccount} <a href="/sign-up">${words.signUp}</a></p>`,
  ])
}

export function signUp({ enter }) {
  const invite = location.hash.slice(1) || null
  return gate(words.signUp, [
    form(words.signUp, [emailField(), newPasswordField()], async (given) => {
      await api.post("/api/auth/sign-up", { ...given, invite })
      enter()
    }),
    html`<p class="hint">${words.haveAccount} <a href="/sign-in">${words.signIn}</a></p>`,
  ])
}

function gate(title, content) {
  return html`<div class="card stack gate"><h1>${title}</h1>${content}</div>`
}
