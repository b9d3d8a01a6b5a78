// Swagger UI without anything from elsewhere. A key that is entered stays in the page's memory, and goes with it.
(function () {
  "use strict";
  var root = document.getElementById("reference");
  var page = document.documentElement;
  // Chosen on the other pages (theme.js), else the system's: the class is Swagger UI's own.
  var isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  page.classList.toggle("dark-mode", page.dataset.theme ? page.dataset.theme === "dark" : isDark);
  window.SwaggerUIBundle({
    url: root.dataset.document,
    domNode: root,
    presets: [window.SwaggerUIBundle.presets.apis],
    layout: "BaseLayout",
    // With links in them the operations' buttons would hold what takes the keyboard's focus a second time.
    deepLinking: false,
    validatorUrl: null,
    persistAuthorization: false,
    queryConfigEnabled: false,
    displayRequestDuration: true,
    tryItOutEnabled: true,
    defaultModelsExpandDepth: 0,
    requestInterceptor: function (request) {
      if (!request.loadSpec) request.headers["Accept-Language"] = document.documentElement.lang;
      return request;
    },
  });
})();
