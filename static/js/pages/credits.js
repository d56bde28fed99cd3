// What one has, what can be bought, and what was.

import { api, Problem } from "../api.js"
import { guarded } from "../form.js"
import { html, render } from "../html.js"
import { moments } from "../live.js"
import { number, paidText, titles } from "../money.js"
import { balanceCard, banner } from "../parts.js"
import { date, fill, say, words } from "../words.js"
import { planCard } from "./plan.js"
import { shop } from "./shop.js"

const PAUSES_S = [1, 2, 3, 5, 10, 20, 40]

export async function credits({ signal }) {
  const page = html`
    <div class="stack wide">
      <div><h1>${words.credits}</h1><p class="told" role="status"></p></div>
      <div class="stack wide"></div>
    </div>`.firstElementChild
  const [news, content] = page.querySelectorAll(".told, .wide")
  const bought = await refresh()
  if (new URLSearchParams(location.search).has("signature")) comeBack()
  return page

  async function refresh() {
    const [products, billing, balance, history] = await Promise.all([
      api.get("/api/v1/config/products"), api.get("/api/v1/user/billing"),
      api.get("/api/v1/credit/balance"), api.get("/api/v1/credit/history?limit=10")])
    render(content, [
      billing.isSandbox && banner(),
      balanceCard(balance, billing),
      planCard({ billing, products, changed: refresh }),
      shop({ billing, products, changed: refresh }),
      paymentsCard(billing.payments, titles(products)),
      historyCard(history.transactions),
    ])
    return billing.payments
  }

  // From Creem, which signed the query.  The credits come by another way, perhaps later.
  async function comeBack() {
    const query = location.search
    try {
      const { received } = await api.get(`/api/v1/billing/return${query}`)
      if (signal.aborted) return
      history.replaceState(null, "", location.pathname)
      news.textContent = received ? words.received : words.pending
      for await (const _ of moments("credits.granted", PAUSES_S, signal)) {
        const payments = await refresh()
        if (payments.length > bought.length || (received && payments.some(isOf(query)))) {
          news.textContent = words.arrived
          return
        }
      }
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem
      news.textContent = say(problem)
    }
  }
}

function isOf(query) {
  const { order_id: order, subscription_id: subscription } = Object.fromEntries(new URLSearchParams(query))
  return (payment) => (order && payment.orderId === order) || (subscription && payment.subscriptionId === subscription)
}

function paymentsCard(payments, title) {
  const section = html`
    <section class="card stack" aria-labelledby="payments">
      <h2 id="payments">${words.payments}</h2>
      ${payments.length ? html`<ul class="rows">${payments.map(row)}</ul>` : html`<p>${words.nothing}</p>`}
      <p class="wrong" role="alert" hidden></p>
      ${payments.length > 0 && html`<button class="second" id="portal" @click=${openPortal}>${words.portal}</button>`}
    </section>`.firstElementChild
  return section

  function row(payment) {
    return html`
      <li><div><strong>${title(payment.product)}</strong><p class="hint">${date(payment.boughtAt)} · ${paidText(payment)}</p></div>
        <span class="amount">${fill(words.creditsOf, { n: number(payment.credits) })}</span></li>`
  }

  function openPortal(event) {
    guarded(event.target, section.querySelector(".wrong"), async () => {
      location.assign((await api.post("/api/v1/billing/portal")).url)
    })
  }
}

function historyCard(lines) {
  const kinds = {
    NEW_USER: words.gift, ORDER_PAY: words.packBought, SUBSCRIPTION: words.planPaid, VIDEO_CONSUME: words.video,
    REFUND: words.refunded, EXPIRED: words.expired, SYSTEM_ADJUST: words.adjusted,
  }
  return html`
    <section class="card stack" aria-labelledby="history">
      <h2 id="history">${words.history}</h2>
      ${lines.length ? html`<ul class="rows">${lines.map(row)}</ul>` : html`<p>${words.nothing}</p>`}
    </section>`

  function row(line) {
    return html`
      <li><div><strong>${kinds[line.transType] ?? line.transType}</strong>
          <p class="hint">${date(line.createdAt)} · ${fill(words.left, { n: number(line.balanceAfter) })}</p></div>
        <span class="amount">${number(line.credits, { signDisplay: "exceptZero" })}</span></li>`
  }
}
