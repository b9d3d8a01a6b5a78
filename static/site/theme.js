// In the head and before the styles are used: a chosen theme never flashes in the other one.
(function () {
  "use strict";
  var root = document.documentElement;
  root.classList.add("js");
  try {
    var kept = localStorage.getItem("theme");
    if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  } catch (error) {
    // Storage may be forbidden; the system's theme then stands.
  }
})();
