// Forms that send what is in them, say what is wrong with it, and cannot be sent twice at once.

import { Problem } from "./api.js"
import { focusAgain, html } from "./html.js"
import { say, words } from "./words.js"

export function form(button, fields, send) {
  return html`
    <form class="stack" @submit=${submit}>
      ${fields}
      <p class="wrong" role="alert" hidden></p>
      <button>${button}</button>
    </form>`

  function submit(event) {
    event.preventDefault()
    const { target } = event
    guarded(target.querySelector("button"), target.querySelector(".wrong"), async () => {
      await send(Object.fromEntries(new FormData(target)))
      target.reset()
    })
  }
}

// While something is done its button rests; a refusal becomes a sentence.  The focus stays where it was.
export async function guarded(button, wrong, act) {
  const at = document.activeElement
  button.disabled = true
  wrong.hidden = true
  try {
    await act()
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem
    wrong.textContent = say(problem)
    wrong.hidden = false
  } finally {
    button.disabled = false
    if (document.activeElement === document.body) focusAgain(at)
  }
}

export function emailField() {
  return html`
    <label>${words.email}
      <input name="email" type="email" required maxlength="254" autocomplete="username" spellcheck="false"></label>`
}

export function passwordField() {
  return html`
    <label>${words.password}
      <input name="password" type="password" required maxlength="256" autocomplete="current-password"></label>`
}

export function newPasswordField() {
  return html`
    <div class="field">
      <label>${words.password}
        <input name="password" type="password" required minlength="8" maxlength="256" autocomplete="new-password"
          aria-describedby="rule"></label>
      <p class="hint" id="rule">${words.passwordHint}</p>
    </div>`
}
