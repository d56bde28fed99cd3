// html`<p class=${name} @click=${act}>${text}</p>` makes DOM nodes.
// A value becomes text, an attribute, a listener or child nodes: never markup.  Links begin where the server does.

import { home } from "./home.js"

const templates = new WeakMap()
const HOLE = /^hole (\d+)$/

export function html(strings, ...values) {
  if (!templates.has(strings)) templates.set(strings, compile(strings))
  const fragment = templates.get(strings).content.cloneNode(true)
  const walker = document.createTreeWalker(fragment, NodeFilter.SHOW_ELEMENT | NodeFilter.SHOW_COMMENT)
  const holes = []
  while (walker.nextNode()) {
    const node = walker.currentNode
    if (node.nodeType === Node.COMMENT_NODE) holes.push(node)
    else for (const { name, value } of [...node.attributes]) fill(node, name, HOLE.exec(value), values)
  }
  for (const hole of holes) {
    const match = HOLE.exec(hole.data)
    if (match) hole.replaceWith(...nodes(values[match[1]]))
  }
  return fragment
}

export function render(place, ...content) {
  const at = place.contains(document.activeElement) && document.activeElement
  place.replaceChildren(...content.flatMap(nodes))
  if (at) focusAgain(at)
}

// On what took its place, where it was replaced meanwhile.
export function focusAgain(element) {
  const now = element.isConnected ? element : document.getElementById(element.id)
  now?.focus()
}

function compile(strings) {
  const template = document.createElement("template")
  template.innerHTML = strings.reduce((markup, string, i) => {
    const insideTag = markup.lastIndexOf("<") > markup.lastIndexOf(">")
    return markup + (insideTag ? `"hole ${i - 1}"` : `<!--hole ${i - 1}-->`) + string
  }).replaceAll(' href="/', ` href="${home}/`)
  return template
}

function fill(node, name, match, values) {
  if (!match) return
  const value = values[match[1]]
  node.removeAttribute(name)
  if (name.startsWith("@")) node.addEventListener(name.slice(1), value)
  else if (value === true) node.setAttribute(name, "")
  else if (value !== false && value != null) node.setAttribute(name, name === "href" ? home + value : value)
}

function nodes(value) {
  if (value == null || value === false) return []
  if (Array.isArray(value)) return value.flatMap(nodes)
  return [value instanceof Node ? value : String(value)]
}
