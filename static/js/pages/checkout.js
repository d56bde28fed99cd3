// Where one pays in the sandbox: with test cards only.

import { api, Problem } from "../api.js"
import { form } from "../form.js"
import { html } from "../html.js"
import { number, price, titleOf } from "../money.js"
import { banner } from "../parts.js"
import { fill, words } from "../words.js"

const plain = (text) => text.replace(/[\s-]/g, "")

export async function checkout() {
  const id = encodeURIComponent(location.hash.slice(1))
  const sold = await api.get(`/api/v1/sandbox/checkouts/${id || "-"}`).catch((problem) => {
    if (problem.status !== 404) throw problem
  })
  if (!sold) return html`<div class="card stack gate"><h1>${words.checkout}</h1><p>${words.noCheckout}</p></div>`
  const cards = testCards()
  return html`
    <div class="stack gate">
      ${banner()}
      <div class="card stack">
        <div><h1>${words.checkout}</h1>
          <p>${titleOf(sold)} · ${fill(words.creditsOf, { n: number(sold.credits) })} · <strong>${price(sold)}</strong></p></div>
        ${form(fill(words.pay, { price: price({ ...sold, interval: null }) }), fields(), pay)}
        <section class="stack" aria-labelledby="cards">
          <h2 id="cards">${words.cards}</h2>
          <ul class="rows cards">${Object.entries(cards).map(row)}</ul>
        </section>
      </div>
    </div>`

  async function pay({ number }) {
    const what = Object.entries(cards).find(([card]) => plain(card) === plain(number))?.[1]
    if (!what) throw new Problem(400, { message: words.noTestCard }) // perhaps a real one: it goes nowhere
    const { url } = await api.post(`/api/v1/sandbox/checkouts/${id}/pay`, { number }).catch((problem) => {
      throw problem.code === "E4031" ? new Problem(402, { message: fill(words.unlucky, { what }) }) : problem
    })
    location.assign(url)
  }
}

// Creem's own; what each does.
function testCards() {
  return {
    "4242 4242 4242 4242": words.cardPays, "4111 1111 1111 1111": words.cardPays,
    "4000 0000 0000 0002": words.cardDeclined, "4507 9900 0000 0028": words.cardDeclined,
    "4000 0000 0000 9995": words.cardPoor, "4507 9900 0000 0010": words.cardPoor,
    "4000 0000 0000 0127": words.cardCode, "4507 9900 0000 0044": words.cardCode,
    "4000 0000 0000 0069": words.cardExpired,
  }
}

function fields() {
  return html`
    <label>${words.cardNumber}
      <input name="number" id="number" value="4242 4242 4242 4242" inputmode="numeric" required maxlength="30"
        autocomplete="off"></label>
    <div class="field">
      <div class="pair">
        <label>${words.expiry}
          <input placeholder="12 / 34" maxlength="9" autocomplete="off" aria-describedby="not-sent"></label>
        <label>${words.code}
          <input placeholder="123" maxlength="4" inputmode="numeric" autocomplete="off" aria-describedby="not-sent"></label>
      </div>
      <p class="hint" id="not-sent">${words.notSent}</p>
    </div>`
}

function row([card, what]) {
  return html`
    <li><button type="button" class="plain" aria-label=${fill(words.takeCard, { number: card })} @click=${take}>${card}</button>
      <span>${what}</span></li>`

  function take() {
    const field = document.getElementById("number")
    field.value = card
    field.focus()
  }
}
