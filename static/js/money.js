// Numbers, money and what is sold, as the reader writes them.

import { fill, words } from "./words.js"

const language = document.documentElement.lang
const currencyFormat = (currency) => new Intl.NumberFormat(language, { style: "currency", currency })

export const number = (n, options) => new Intl.NumberFormat(language, options).format(n)

// How many digits of an amount in a currency's smallest unit come after the point.
export const decimals = (currency) => currencyFormat(currency).resolvedOptions().maximumFractionDigits

export const money = (cents, currency) => currencyFormat(currency).format(cents / 10 ** decimals(currency))

export function price({ cents, currency, interval }) {
  const sum = money(cents, currency)
  return interval ? fill(interval === "year" ? words.aYear : words.aMonth, { price: sum }) : sum
}

export function titleOf({ name, interval }) {
  return interval ? fill(interval === "year" ? words.yearly : words.monthly, { name }) : name
}

// What a product is called, from its id; who bought it may know it longer than it is on sale.
export function titles({ packs, plans }) {
  const known = new Map([...packs, ...plans].map((product) => [product.id, titleOf(product)]))
  return (id) => known.get(id) ?? id
}

export function paidText({ paid, back, currency }) {
  if (paid === null || !currency) return ""
  return money(paid, currency) + (back ? ` · ${fill(words.paidBack, { price: money(back, currency) })}` : "")
}
