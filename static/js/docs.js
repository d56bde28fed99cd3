// The API's manual, from the document that the server makes of its own code.

addEventListener("load", () => {
  window.SwaggerUIBundle({ url: "/openapi.json", dom_id: "#docs", deepLinking: true, tryItOutEnabled: true })
})
