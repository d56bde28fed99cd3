// What more than one page shows.

import { html } from "./html.js"
import { number } from "./money.js"
import { fill, words } from "./words.js"

export const banner = () => html`<p class="banner" role="note">${words.sandboxNote}</p>`

export function balanceCard(balance, { isDisputed }) {
  const facts = [[words.available, balance.availableCredits], [words.frozen, balance.frozenCredits]]
  if (balance.expiringSoon) facts.push([words.soon, balance.expiringSoon])
  if (balance.debt) facts.push([words.debt, balance.debt])
  return html`
    <section class="card stack" aria-labelledby="balance">
      <h2 id="balance">${words.balance}</h2>
      <dl class="facts">${facts.map(([name, n]) => html`<div><dt>${name}</dt><dd>${number(n)}</dd></div>`)}</dl>
      ${balance.debt > 0 && html`<p class="hint">${fill(words.debtMeans, { n: number(balance.debt) })}</p>`}
      ${isDisputed && html`<p class="wrong">${words.disputed}</p>`}
    </section>`
}
