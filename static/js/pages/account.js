// What one has, and the keys by which programs use it.

import { api } from "../api.js"
import { form, guarded } from "../form.js"
import { html, render } from "../html.js"
import { number } from "../money.js"
import { date, fill, words } from "../words.js"

export async function account() {
  const [user, balance, keys] = await Promise.all([
    api.get("/api/v1/user/me"), api.get("/api/v1/credit/balance"), api.get("/api/v1/keys")])
  return html`
    <div class="stack wide">
      <div><h1>${words.home}</h1><p class="hint">${user.email}</p></div>
      ${endings({ creditsEnd: balance.expiringSoon, videosEnd: user.archivingSoon })}
      ${credits(balance)}
      ${keysOf(keys.keys)}
    </div>`
}

// What is about to go, a week before.
function endings(numbers) {
  const soon = Object.entries(numbers).filter(([, n]) => n > 0)
  return soon.length > 0 && html`
    <div class="banner stack" role="note">${soon.map(([name, n]) => html`<p>${fill(words[name], { n: number(n) })}</p>`)}</div>`
}

function credits(balance) {
  const facts = {
    available: balance.availableCredits, frozen: balance.frozenCredits,
    used: balance.usedCredits, soon: balance.expiringSoon,
  }
  return html`
    <section class="card stack" aria-labelledby="credits">
      <h2 id="credits">${words.credits}</h2>
      <dl class="facts">${Object.entries(facts).map(([name, n]) => html`<div><dt>${words[name]}</dt><dd>${n}</dd></div>`)}</dl>
    </section>`
}

function keysOf(keys) {
  const section = html`
    <section class="card stack" aria-labelledby="keys">
      <h2 id="keys" tabindex="-1">${words.keys}</h2>
      <p class="hint">${words.keyUse}</p>
      ${form(words.makeKey, html`
        <label>${words.keyName} <input name="name" required maxlength="100" autocomplete="off"></label>`, make)}
      <div class="made" role="status"></div>
      <div class="list"></div>
      <p class="wrong" role="alert" hidden></p>
    </section>`.firstElementChild
  const [made, list, wrong] = [".made", ".list", ":scope > .wrong"].map((part) => section.querySelector(part))
  showList(keys)
  return section

  function showList(keys) {
    render(list, keys.length ? html`<ul class="rows">${keys.map(row)}</ul>` : html`<p>${words.noKeys}</p>`)
  }

  function row(key) {
    const used = key.lastUsedAt ? `${words.lastUsed} ${date(key.lastUsedAt)}` : words.neverUsed
    return html`
      <li><div><strong>${key.name}</strong><p class="hint"><code>vf_…${key.hint}</code> · ${used}</p></div>
        <button class="quiet" aria-label=${`${words.revokeKey} ${key.name}`} @click=${revoke}>${words.revoke}</button></li>`

    function revoke(event) {
      if (confirm(`${words.revokeKey} ${key.name}? ${words.revokeMeans}`)) {
        guarded(event.target, wrong, async () => {
          await api.delete(`/api/v1/keys/${key.id}`)
          await refresh()
          section.querySelector("h2").focus() // the button that had it is gone
        })
      }
    }
  }

  async function make(given) {
    const { apiKey } = await api.post("/api/v1/keys", given)
    render(made, html`<p>${words.keyOnce}</p><code class="secret">${apiKey}</code>`)
    await refresh()
  }

  async function refresh() {
    showList((await api.get("/api/v1/keys")).keys)
  }
}
