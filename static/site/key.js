// "Check your key": the key goes from the field into one header, and nowhere else.
(function () {
  "use strict";

  var form = document.querySelector(".key-form");
  if (!form) return;
  var field = form.querySelector("input");
  var message = form.querySelector(".key-message");
  var result = form.querySelector(".key-result");
  var language = document.documentElement.lang;
  var money = new Intl.NumberFormat(language, { style: "currency", currency: "USD", currencyDisplay: "narrowSymbol", maximumFractionDigits: 4, minimumFractionDigits: 2 });
  var whole = new Intl.NumberFormat(language);
  var SVG = "http://www.w3.org/2000/svg";

  form.querySelector("fieldset").disabled = false;
  form.addEventListener("submit", function (event) {
    event.preventDefault();
    check(field.value.trim());
  });
  var sample = form.querySelector(".use-sample");
  if (sample) sample.addEventListener("click", function () {
    field.value = field.dataset.sample;
    check(field.value);
  });
  // A page kept for "back" must not keep the key.
  window.addEventListener("pagehide", function () { field.value = ""; });

  async function ask(path, key) {
    // A header holds no other characters, and no key has them.
    if (!/^[\x21-\x7e]+$/.test(key)) throw new Error(form.dataset.invalid);
    var answer = await fetch(path, {
      headers: { "Authorization": "Bearer " + key, "Accept-Language": language },
      cache: "no-store", credentials: "omit", referrerPolicy: "no-referrer"
    });
    var body = await answer.json();
    if (!answer.ok) throw new Error(body.message);
    return body.data;
  }

  async function check(key) {
    var button = form.querySelector("[type=submit]");
    if (!key) return;
    button.disabled = true;
    say("", false);
    try {
      var answers = await Promise.all([ask("/pro/balance", key), ask("/pro/usage", key)]);
      show(answers[0], answers[1].rows);
    } catch (error) {
      result.hidden = true;
      say(error instanceof TypeError || error instanceof SyntaxError ? form.dataset.offline : error.message, true);
    }
    button.disabled = false;
  }

  function say(words, isBad) {
    message.textContent = words;
    message.classList.toggle("bad", isBad);
  }

  function show(balance, rows) {
    Object.keys(balance).forEach(function (name) {
      var place = form.querySelector('[data-sum="' + name + '"]');
      if (place) place.textContent = money.format(balance[name]);
    });
    var days = byDay(rows, Number(form.dataset.days));
    var room = form.querySelector(".chart-room");
    room.replaceChildren(chart(days));
    fillTable(rows);
    result.hidden = false;
    if (!rows.length) say(form.dataset.none, false);
  }

  function byDay(rows, count) {
    var days = [];
    var found = new Map();
    var today = Date.now();
    for (var back = count - 1; back >= 0; back--) {
      var day = { date: new Date(today - back * 86400000).toISOString().slice(0, 10), cost: 0, requests: 0, unpriced_requests: 0 };
      days.push(day);
      found.set(day.date, day);
    }
    rows.forEach(function (row) {
      var day = found.get(row.date);
      if (!day) return;
      day.cost += row.cost;
      day.requests += row.requests;
      day.unpriced_requests += row.unpriced_requests;
    });
    return days;
  }

  // The chart

  function draw(name, attributes, text) {
    var element = document.createElementNS(SVG, name);
    Object.keys(attributes).forEach(function (key) { element.setAttribute(key, attributes[key]); });
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function roundUp(value) {
    if (value <= 0) return 1;
    var power = Math.pow(10, Math.floor(Math.log10(value)));
    return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map(function (step) { return step * power; }).find(function (step) { return step >= value * 0.999; });
  }

  function chart(days) {
    var width = Math.max(320, form.querySelector(".chart").clientWidth || form.clientWidth), height = 208;
    var left = 56, bottom = 24, top = 10;
    var highest = days.reduce(function (best, day) { return day.cost > best.cost ? day : best; }, days[0]);
    var scale = roundUp(highest.cost);
    var step = (width - left) / days.length;
    var svg = draw("svg", { viewBox: "0 0 " + width + " " + height, role: "img" });
    svg.setAttribute("aria-label", form.dataset.peak + ": " + highest.date + ", " + money.format(highest.cost));
    [0, 0.5, 1].forEach(function (share) {
      var y = top + (height - top - bottom) * (1 - share);
      svg.append(
        draw("line", { "class": "grid", x1: left, x2: width, y1: y, y2: y }),
        draw("text", { x: left - 8, y: y + 4, "text-anchor": "end" }, shortMoney(scale * share))
      );
    });
    days.forEach(function (day, at) {
      var tall = (height - top - bottom) * day.cost / scale;
      var x = left + at * step;
      var group = draw("g", {});
      group.append(
        draw("rect", { "class": "slot", x: x, y: top, width: step, height: height - top - bottom }),
        draw("rect", { "class": "bar", x: x + step * 0.14, y: height - bottom - Math.max(tall, day.requests ? 1.5 : 0), width: step * 0.72, height: Math.max(tall, day.requests ? 1.5 : 0), rx: Math.min(2, step / 4) })
      );
      group.addEventListener("pointerenter", function () { read(day); });
      svg.append(group);
    });
    [0, Math.floor((days.length - 1) / 2), days.length - 1].forEach(function (at, place) {
      var anchor = ["start", "middle", "end"][place];
      var x = left + step * (at + [0, 0.5, 1][place]);
      svg.append(draw("text", { x: x, y: height - 5, "text-anchor": anchor }, days[at].date.slice(5)));
    });
    read(highest.cost ? highest : days[days.length - 1]);
    return svg;
  }

  function shortMoney(value) {
    return "$" + (value >= 1000 ? Math.round(value / 100) / 10 + "k" : String(+value.toPrecision(2)));
  }

  // What has no known price is not for free.
  function costOf(sums) {
    if (!sums.unpriced_requests) return money.format(sums.cost);
    return (sums.cost ? money.format(sums.cost) + " + " : "") + form.dataset.unpriced;
  }

  function read(day) {
    form.querySelector(".chart-reading").textContent =
      day.date + " · " + costOf(day) + " · " + whole.format(day.requests) + " " + form.dataset.requests;
  }

  // The table

  function fillTable(rows) {
    var models = new Map();
    var shown = ["requests", "input_tokens", "cached_input_tokens", "output_tokens", "cost"];
    var names = shown.concat("unpriced_requests");
    rows.forEach(function (row) {
      var name = row.model || form.dataset.other;
      if (!models.has(name)) models.set(name, { model: name, requests: 0, input_tokens: 0, cached_input_tokens: 0, output_tokens: 0, cost: 0, unpriced_requests: 0 });
      names.forEach(function (field) { models.get(name)[field] += row[field]; });
    });
    var sorted = Array.from(models.values()).sort(function (one, other) { return other.cost - one.cost || other.requests - one.requests; });
    form.querySelector("tbody").replaceChildren.apply(form.querySelector("tbody"), sorted.map(function (sums) {
      var line = document.createElement("tr");
      var head = document.createElement("th");
      head.scope = "row";
      head.textContent = sums.model;
      line.append(head);
      shown.forEach(function (field) {
        var cell = document.createElement("td");
        cell.className = "number";
        cell.textContent = field === "cost" ? costOf(sums) : whole.format(sums[field]);
        line.append(cell);
      });
      return line;
    }));
  }
})();
