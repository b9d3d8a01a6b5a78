// Makes pages that work without it more comfortable: copying, tabs, theme, status.
(function () {
  "use strict";

  function all(selector, within) {
    return Array.prototype.slice.call((within || document).querySelectorAll(selector));
  }

  // Theme

  var theme = document.querySelector(".theme");
  if (theme) theme.addEventListener("click", function () {
    var root = document.documentElement;
    var isDark = getComputedStyle(root).colorScheme === "dark";
    root.dataset.theme = isDark ? "light" : "dark";
    try { localStorage.setItem("theme", root.dataset.theme); } catch (error) { /* then for this page only */ }
  });

  // Copying

  function copyText(text) {
    if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
    // Plain HTTP, as on a network of one's own, has no clipboard interface.
    var area = document.createElement("textarea");
    area.value = text;
    area.className = "hidden";
    document.body.appendChild(area);
    area.select();
    var done = document.execCommand("copy");
    area.remove();
    return done ? Promise.resolve() : Promise.reject(new Error("not copied"));
  }

  all(".copy").forEach(function (button) {
    var label = button.textContent;
    button.addEventListener("click", function () {
      var source = button.dataset.copies
        ? document.querySelector(button.dataset.copies)
        : button.closest(".code").querySelector("code");
      copyText(source.textContent.trim()).then(function () {
        button.textContent = button.dataset.copied;
        button.classList.add("copied");
        setTimeout(function () {
          button.textContent = label;
          button.classList.remove("copied");
        }, 2000);
      }, function () {
        getSelection().selectAllChildren(source);
      });
    });
  });

  // Tabs

  var groups = [];

  function select(group, index, withFocus) {
    group.tabs.forEach(function (tab, at) {
      tab.setAttribute("aria-selected", String(at === index));
      tab.tabIndex = at === index ? 0 : -1;
      group.panels[at].hidden = at !== index;
    });
    if (withFocus) group.tabs[index].focus();
  }

  all(".tabs").forEach(function (box, number) {
    var group = { tabs: [], panels: all("section[data-tab]", box) };
    var list = document.createElement("div");
    list.setAttribute("role", "tablist");
    list.setAttribute("aria-label", box.getAttribute("aria-label") || "");
    box.removeAttribute("aria-label");
    group.panels.forEach(function (panel, at) {
      var tab = document.createElement("button");
      tab.type = "button";
      tab.id = "tab-" + number + "-" + at;
      tab.textContent = panel.dataset.tab;
      tab.setAttribute("role", "tab");
      panel.id = panel.id || "panel-" + number + "-" + at;
      tab.setAttribute("aria-controls", panel.id);
      panel.setAttribute("role", "tabpanel");
      panel.setAttribute("aria-labelledby", tab.id);
      tab.addEventListener("click", function () { choose(panel.dataset.tab, group, at); });
      list.appendChild(tab);
      group.tabs.push(tab);
    });
    list.addEventListener("keydown", function (event) {
      var at = group.tabs.indexOf(document.activeElement);
      var to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: group.tabs.length - 1 }[event.key];
      if (to === undefined || at < 0) return;
      event.preventDefault();
      to = (to + group.tabs.length) % group.tabs.length;
      choose(group.panels[to].dataset.tab, group, to);
      group.tabs[to].focus();
    });
    box.insertBefore(list, box.firstChild);
    box.classList.add("ready");
    groups.push(group);
    select(group, 0, false);
  });

  // Who reads Python here reads Python there too.
  function choose(name, chosen, index) {
    groups.forEach(function (group) {
      if (group === chosen) return select(group, index, false);
      var at = group.panels.findIndex(function (panel) { return panel.dataset.tab === name; });
      if (at >= 0) select(group, at, false);
    });
  }

  // Status

  function milliseconds(value) {
    return (value < 10 ? value.toFixed(1) : Math.round(value)) + " ms";
  }

  all(".status").forEach(function (line) {
    var text = line.querySelector(".status-text");
    function show(state, words) {
      line.classList.remove("good", "bad");
      if (state) line.classList.add(state);
      text.textContent = words;
    }
    function look() {
      fetch("/status.json").then(function (answer) { return answer.json(); }).then(function (found) {
        if (!found.upstream.reachable) return show("bad", line.dataset.bad);
        show("good", [
          line.dataset.good,
          line.dataset.trip + " " + milliseconds(found.upstream.answer_ms),
          line.dataset.added + " " + milliseconds(found.added_ms)
        ].join(" · "));
      }).catch(function () { show("", line.dataset.away); });
    }
    look();
    setInterval(function () { if (!document.hidden) look(); }, 30000);
  });

  // The terminal: a real request to the sandbox, streamed

  all(".terminal[data-key]").forEach(function (terminal) {
    var button = terminal.querySelector(".run");
    var output = terminal.querySelector(".try-output");
    button.disabled = false;
    button.addEventListener("click", function () {
      button.disabled = true;
      output.textContent = "";
      stream(terminal.dataset.key, terminal.dataset.hello, function (piece) {
        output.textContent += piece;
      }).catch(function (error) {
        output.textContent = error.message;
      }).then(function () { button.disabled = false; });
    });
  });

  async function stream(key, hello, onPiece) {
    var answer = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Authorization": "Bearer " + key, "Content-Type": "application/json" },
      body: JSON.stringify({ model: "gpt-4o-mini", stream: true, messages: [{ role: "user", content: hello }] })
    });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    var reader = answer.body.getReader();
    var decoder = new TextDecoder();
    var rest = "";
    for (;;) {
      var part = await reader.read();
      if (part.done) return;
      var lines = (rest + decoder.decode(part.value, { stream: true })).split("\n");
      rest = lines.pop();
      lines.forEach(function (line) {
        if (!line.startsWith("data: {")) return;
        var choice = JSON.parse(line.slice(6)).choices[0];
        if (choice && choice.delta.content) onPiece(choice.delta.content);
      });
    }
  }
})();
