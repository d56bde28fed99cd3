// What the server tells by itself.

import { home } from "./home.js"

// A moment after each pause, or sooner: when something of that type happened.
export async function* moments(type, pauses_s, signal) {
  const source = new EventSource(`${home}/api/v1/video/events`)
  try {
    for (const pause of pauses_s) {
      await new Promise((resolve) => {
        source.addEventListener(type, resolve, { once: true })
        signal.addEventListener("abort", resolve, { once: true })
        setTimeout(resolve, 1000 * pause)
      })
      if (signal.aborted) return
      yield
    }
  } finally {
    source.close()
  }
}
