// What happens after a purchase, acted out.

import { api } from "../api.js"
import { guarded } from "../form.js"
import { html, render } from "../html.js"
import { decimals, number, paidText, titleOf, titles } from "../money.js"
import { balanceCard, banner } from "../parts.js"
import { date, fill, words } from "../words.js"
import { isLive, stands } from "./plan.js"

export async function sandbox() {
  const page = html`
    <div class="stack wide">
      <div><h1>${words.sandbox}</h1><p class="hint">${words.sandboxMeans}</p></div>
      ${banner()}
      <div class="stack wide"></div>
      <p class="told toast" role="status"></p>
      <p class="told toast wrong" role="alert" hidden></p>
    </div>`.firstElementChild
  const [news, wrong, content] = [".told", ".wrong", ":scope > .stack"].map((part) => page.querySelector(part))
  const { isSandbox } = await refresh()
  return isSandbox ? page : html`<div class="card stack gate"><h1>${words.sandbox}</h1><p>${words.noSandbox}</p></div>`

  async function refresh() {
    const [products, billing, balance] = await Promise.all([
      api.get("/api/v1/config/products"), api.get("/api/v1/user/billing"), api.get("/api/v1/credit/balance")])
    const title = titles(products)
    render(content, [
      balanceCard(balance, billing),
      subscriptionCard(billing.subscription, products.plans, title, act),
      paymentsCard(billing.payments, title, act),
    ])
    return { ...balance, ...billing }
  }

  function act(button, path, body) {
    news.textContent = ""
    guarded(button, wrong, async () => {
      await api.post(`/api/v1/${path}`, body)
      const { availableCredits, debt } = await refresh()
      news.textContent = fill(words.done, { n: number(availableCredits), debt: number(debt) })
    })
  }
}

function subscriptionCard(subscription, plans, title, act) {
  const plan = subscription && plans.find(({ id }) => id === subscription.plan)
  const button = (id, text, path, body) =>
    html`<button class="second" id=${id} @click=${({ target }) => act(target, path, body)}>${text}</button>`
  return html`
    <section class="card stack" aria-labelledby="plan">
      <h2 id="plan">${words.plan}</h2>
      ${subscription ? stands(title(subscription.plan), subscription) : html`<p>${words.noPlan}</p>`}
      ${isLive(subscription) && [
        html`<div class="buttons">
          ${button("renew", plan?.interval === "year" ? words.passYear : words.passMonth, "sandbox/act", { act: "renew" })}
          ${subscription.status === "scheduled_cancel"
            ? button("ending", words.resumePlan, "billing/subscription/resume")
            : button("ending", words.cancelPlan, "billing/subscription/cancel")}
          ${button("end", words.cancelNow, "billing/subscription/cancel", { mode: "immediate" })}
        </div>`,
        html`<form class="buttons" @submit=${change}>
          <label>${words.otherPlan} <select name="productId">
            ${plans.filter((other) => other !== plan).map((other) => html`<option value=${other.id}>${titleOf(other)}</option>`)}
          </select></label>
          <button class="second" id="change">${words.changePlan}</button>
        </form>`]}
    </section>`

  function change(event) {
    event.preventDefault()
    act(event.submitter, "billing/subscription/upgrade", Object.fromEntries(new FormData(event.target)))
  }
}

function paymentsCard(payments, title, act) {
  return html`
    <section class="card stack" aria-labelledby="payments">
      <h2 id="payments">${words.payments}</h2>
      ${payments.length > 0 && html`<ul class="rows tall">${payments.map(row)}</ul>`}
      ${payments.length === 0 && html`<p>${words.nothing} <a href="/credits">${words.credits}</a></p>`}
    </section>`

  function row(payment) {
    const { payment: id, product, boughtAt, currency, paid, back } = payment
    const digits = currency ? decimals(currency) : 0
    const [scale, left] = [10 ** digits, (paid - back) / 10 ** digits]
    const what = { name: title(product), date: date(boughtAt) }
    return html`
      <li><div><strong>${what.name}</strong><p class="hint">${what.date} · ${paidText(payment)}</p></div>
        ${left > 0 && html`
          <form class="buttons" @submit=${giveBack}>
            <label>${fill(words.amount, { currency })}
              <input name="amount" id=${`amount-${id}`} type="number" required
                value=${left.toFixed(digits)} max=${left} min=${1 / scale} step=${1 / scale}></label>
            <button class="second" id=${`refund-${id}`} aria-label=${fill(words.refundThis, what)}>${words.refund}</button>
            <button type="button" class="quiet" id=${`dispute-${id}`} aria-label=${fill(words.disputeThis, what)}
              @click=${dispute}>${words.dispute}</button>
          </form>`}</li>`

    function giveBack(event) {
      event.preventDefault()
      const cents = Math.round(new FormData(event.target).get("amount") * scale)
      act(event.submitter, "sandbox/act", { act: "refund", payment: id, cents })
    }

    function dispute({ target }) {
      act(target, "sandbox/act", { act: "dispute", payment: id })
    }
  }
}
