// One's plan: how it stands, its end and its going on.

import { api } from "../api.js"
import { guarded } from "../form.js"
import { html } from "../html.js"
import { titles } from "../money.js"
import { day, fill, words } from "../words.js"

// Whether there is a subscription that Creem would still change; another one beside it would be a second.
export const isLive = (subscription) => subscription !== null && !["canceled", "expired"].includes(subscription.status)

export function planCard({ billing: { subscription }, products, changed }) {
  const name = subscription && titles(products)(subscription.plan)
  const section = html`
    <section class="card stack" aria-labelledby="plan">
      <h2 id="plan">${words.plan}</h2>
      ${subscription ? stands(name, subscription) : html`<p>${words.noPlan}</p>`}
      <p class="wrong" role="alert" hidden></p>
      ${isLive(subscription) && changing()}
    </section>`.firstElementChild
  return section

  function changing() {
    return ["scheduled_cancel", "paused"].includes(subscription.status)
      ? html`<button id="ending" @click=${resume}>${words.resumePlan}</button>`
      : html`<button class="quiet" id="ending" @click=${cancel}>${words.cancelPlan}</button>`
  }

  function resume(event) {
    ask(event.target, "resume")
  }

  function cancel(event) {
    if (confirm(fill(words.cancelMeans, { name }))) ask(event.target, "cancel")
  }

  function ask(button, what) {
    guarded(button, section.querySelector(".wrong"), async () => {
      await api.post(`/api/v1/billing/subscription/${what}`)
      await changed()
    })
  }
}

export function stands(name, subscription) {
  return html`<p><strong>${name}</strong><br>${standing(subscription)}</p>`
}

function standing({ status, isRunning, periodEndAt }) {
  const told = {
    active: words.renews, trialing: words.renews, scheduled_cancel: words.ends, past_due: words.overdue,
    unpaid: words.overdue, paused: words.paused, canceled: words.ended, expired: words.ended,
  }
  if (!isRunning && ["active", "trialing", "scheduled_cancel"].includes(status)) return words.givenBack
  return fill(told[status] ?? status, { date: periodEndAt ? day(periodEndAt) : "…" })
}
