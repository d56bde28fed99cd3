// Plans and packs, and the way to where they are paid.

import { api } from "../api.js"
import { guarded } from "../form.js"
import { html } from "../html.js"
import { number, price, titleOf } from "../money.js"
import { fill, words } from "../words.js"
import { isLive } from "./plan.js"

const keys = new Map() // by product: the same wish keeps its key, until somebody comes back from paying
addEventListener("pageshow", () => keys.clear())

export function shop({ billing, products, changed }) {
  return [
    products.plans.length > 0 && shelf("plans", words.plans, "", products.plans, planOffer),
    products.packs.length > 0 && shelf("packs", words.packs, words.packsMean, products.packs, packOffer),
  ]

  function planOffer(plan) {
    if (!isLive(billing.subscription)) return deal(plan, words.buy, words.buyThis, buy)
    if (plan.id === billing.subscription.plan) return html`<p class="mine">${words.plan}</p>`
    return deal(plan, words.change, words.changeTo, change)
  }

  function packOffer(pack) {
    const closed = pack.openTo === "subscribers" && !billing.plan
    return [closed && html`<p class="hint">${words.subscribers}</p>`, deal(pack, words.buy, words.buyThis, buy, closed)]
  }

  async function change(plan, name) {
    if (!confirm(`${name}?`)) return
    await api.post("/api/v1/billing/subscription/upgrade", { productId: plan.id })
    await changed()
  }
}

function shelf(id, title, hint, products, offer) {
  return html`
    <section class="card stack" aria-labelledby=${id}>
      <div><h2 id=${id}>${title}</h2>${hint && html`<p class="hint">${hint}</p>`}</div>
      <ul class="offers">${products.map((product) => html`
        <li><h3>${titleOf(product)}</h3>
          <p>${fill(words.creditsOf, { n: number(product.credits) })}<br><strong>${price(product)}</strong></p>
          ${offer(product)}</li>`)}</ul>
      <p class="wrong" role="alert" hidden></p>
    </section>`
}

function deal(product, text, long, act, closed) {
  const [id, look] = [`product-${product.id}`, act === buy ? null : "second"]
  const name = fill(long, { name: titleOf(product), price: price(product) })
  return html`<button class=${look} id=${id} aria-label=${name} disabled=${closed} @click=${go}>${text}</button>`

  function go({ target }) {
    guarded(target, target.closest("section").querySelector(".wrong"), () => act(product, name))
  }
}

async function buy({ id }) {
  if (!keys.has(id)) keys.set(id, crypto.randomUUID())
  const { url } = await api.post("/api/v1/billing/checkout", { productId: id }, { "Idempotency-Key": keys.get(id) })
  location.assign(url)
}
