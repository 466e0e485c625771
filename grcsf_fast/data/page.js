"use strict";
// What the pages of predict and evaluate share: a table that is sorted and searched, a view of one case, charts.
// All text of cases goes through textContent and setAttribute, never through HTML.
const page = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const HASH = "#case=";

  const byId = (id) => document.getElementById(id);
  const data = (id) => JSON.parse(byId(id).textContent);

  function filled(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined && value !== false) {
        element.setAttribute(name, value === true ? "" : String(value));
      }
    }
    element.append(...children.filter((child) => child !== null && child !== undefined).map(
      (child) => (typeof child === "number" ? String(child) : child)));
    return element;
  }

  const make = (tag, attributes = {}, ...children) => filled(document.createElement(tag), attributes, children);
  const draw = (tag, attributes = {}, ...children) =>
    filled(document.createElementNS(SVG, tag), attributes, children);

  // null: undefined, such as a distance to nothing. What comes of rounding is 0, without a sign.
  const number = (value, digits) => (typeof value === "number" ? (Math.abs(value) < 1e-9 ? 0 : value).toFixed(digits) : "\u2013");
  // What is not 0, such as a lesion of a mouse in mL, is not shown as 0.
  function amount(value, digits) {
    const text = number(value, digits);
    return Math.abs(value) >= 1e-9 && Number(text) === 0 ? value.toPrecision(2) : text;
  }

  const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

  const address = (one) => HASH + one.id;

  // Pairs of a term and what it is: text, or elements.
  const terms = (pairs) => make("dl", {}, ...pairs.flatMap(([term, value]) => [
    make("dt", {}, term), make("dd", {}, ...[value].flat())]));

  // {a: {b: 1}} as [["a.b", "1"]].
  function flat(value, before = "") {
    if (value !== null && typeof value === "object" && !Array.isArray(value)) {
      return Object.entries(value).flatMap(([name, item]) => flat(item, before ? `${before}.${name}` : name));
    }
    const nested = Array.isArray(value) && value.some((one) => one !== null && typeof one === "object");
    return [[before, nested ? JSON.stringify(value) : Array.isArray(value) ? value.join(", ") : String(value)]];
  }

  // Pictures inside the page are decoded when they come into view, or when the page is printed.
  const waiting = new Map();
  const watcher = typeof IntersectionObserver === "undefined" ? null : new IntersectionObserver((entries) => {
    entries.filter((entry) => entry.isIntersecting).forEach((entry) => load(entry.target));
  }, { rootMargin: "600px" });

  function load(image) {
    image.setAttribute("src", waiting.get(image));
    waiting.delete(image);
    if (watcher) watcher.unobserve(image);
  }

  function thumbnail(source, description) {
    const image = make("img", { alt: description, width: 80, height: 96 });
    waiting.set(image, source);
    if (watcher) watcher.observe(image);
    else load(image);
    return image;
  }

  // Columns: {title, value(case): what is sorted by, cell(case): what is shown, number: true, sorted: false}.
  function table(columns, cases, by, refresh) {
    const rows = new Map();
    const state = { column: by, down: false, order: [] };
    const compare = new Intl.Collator(undefined, { numeric: true }).compare;

    function sort() {
      const { value } = columns[state.column];
      const sign = state.down ? -1 : 1;
      const none = (item) => item === null || item === undefined || item === "";
      state.order = [...cases].sort((first, second) => {
        const [a, b] = [value(first), value(second)];
        // What has no value stands last, whichever way it is sorted.
        if (none(a) || none(b)) return none(a) - none(b);
        return sign * (typeof a === "number" && typeof b === "number" ? a - b : compare(String(a), String(b)));
      });
      heads.forEach((head, index) => {
        if (index === state.column) head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
        else head.removeAttribute("aria-sort");
      });
      byId("rows").replaceChildren(...state.order.map((one) => rows.get(one)));
      refresh();
    }

    const heads = columns.map((column, index) => {
      if (column.sorted === false) return make("th", { scope: "col" }, column.title);
      const button = make("button", { type: "button" }, column.title);
      button.addEventListener("click", () => {
        // Of numbers the largest are looked for first.
        state.down = state.column === index ? !state.down : Boolean(column.number);
        state.column = index;
        sort();
      });
      return make("th", { scope: "col", class: column.number ? "number" : null }, button);
    });
    cases.forEach((one) => {
      rows.set(one, make("tr", {}, ...columns.map((column, index) => (index === 0
        ? make("th", { scope: "row" }, make("a", { href: address(one) }, one.name))
        : make("td", { class: column.number ? "number" : null }, column.cell(one))))));
    });
    byId("head").replaceChildren(make("tr", {}, ...heads));
    return { rows, state, sort };
  }

  // settings: {cases, columns, by: index of the column sorted by at first, words(case): what is searched,
  // describe(case): elements of the view of a case}. The address says which case is open.
  function start(settings) {
    const { cases, columns, hint, by, words, describe } = settings;
    const title = document.title;
    byId("hint").textContent = hint;
    const texts = new Map(cases.map((one) => [one, `${one.name} ${words(one)}`.toLowerCase()]));
    let open = null;

    const filtered = () => list.state.order.filter((one) => !list.rows.get(one).hidden);

    function search() {
      const asked = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
      cases.forEach((one) => {
        list.rows.get(one).hidden = !asked.every((word) => texts.get(one).includes(word));
      });
      const said = asked.length ? `, found by \u201c${asked.join(" ")}\u201d` : "";
      byId("found").textContent = `${filtered().length} of ${plural(cases.length, "case")}${said}`;
    }

    const list = table(columns, cases, by, search);
    list.sort();
    byId("search").addEventListener("input", search);

    // Neighbours in the table as it is sorted and searched; of a case that is searched away, in the whole table.
    function neighbour(step) {
      const order = filtered().includes(open) ? filtered() : list.state.order;
      return order[order.indexOf(open) + step];
    }

    function go(one) {
      if (one) location.hash = address(one);
    }

    function show() {
      const before = open;
      open = cases.find((one) => address(one) === location.hash) || null;
      byId("overview").hidden = open !== null;
      byId("case").hidden = open === null;
      document.title = open === null ? title : `${open.name} - ${title}`;
      if (open !== null) {
        const order = filtered().includes(open) ? filtered() : list.state.order;
        byId("name").textContent = open.name;
        byId("place").textContent = `case ${order.indexOf(open) + 1} of ${order.length}`;
        byId("previous").disabled = !neighbour(-1);
        byId("next").disabled = !neighbour(1);
        byId("details").replaceChildren(...describe(open).filter(Boolean));
        window.scrollTo(0, 0);
        byId("name").focus();
      } else if (before !== null) {
        byId("details").replaceChildren();
        list.rows.get(before).querySelector("a").focus();
      }
    }

    const close = () => { location.hash = "#all"; };
    byId("previous").addEventListener("click", () => go(neighbour(-1)));
    byId("next").addEventListener("click", () => go(neighbour(1)));
    byId("back").addEventListener("click", close);
    document.addEventListener("keydown", (event) => {
      // Keys with Alt are the browser's; a slider and a field need theirs.
      if (open === null || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
      const typing = ["INPUT", "TEXTAREA", "SELECT"].includes(event.target.tagName);
      // So does what scrolls sideways.
      if (event.key !== "Escape" && (typing || event.target.closest?.(".scroll"))) return;
      const act = { ArrowLeft: () => go(neighbour(-1)), ArrowRight: () => go(neighbour(1)), Escape: close }[event.key];
      if (act) {
        event.preventDefault();
        act();
      }
    });
    window.addEventListener("hashchange", show);
    window.addEventListener("beforeprint", () => {
      [...waiting.keys()].forEach(load);
      byId("details").querySelectorAll("details").forEach((one) => { one.open = true; });
    });
    show();
  }

  // A picture of which a part can be shown alone. parts: [{name, box: [x, y, width, height]}], the first at first.
  function picture(source, width, height, parts, description) {
    const image = draw("image", { href: source, width, height });
    const view = draw("svg", { class: "picture", role: "img", "aria-label": description }, image);
    image.addEventListener("error", () => whole.replaceChildren(
      make("p", { class: "odd" }, "The picture is no longer beside this page.")));
    const slider = make("input", { type: "range", min: 0, max: parts.length - 1, step: 1, value: 0, id: "part" });
    const name = make("output", { for: "part" });
    function turn() {
      const part = parts[Number(slider.value)];
      view.setAttribute("viewBox", part.box.join(" "));
      slider.setAttribute("aria-valuetext", part.name);
      name.textContent = part.name;
    }
    slider.addEventListener("input", turn);
    turn();
    const whole = make("div", {}, view,
      make("div", { class: "bar" }, make("label", { for: "part" }, "Slice"), slider, name));
    return whole;
  }

  const WIDE = 480, HIGH = 260, LEFT = 52, RIGHT = 12, TOP = 12, BELOW = 42;

  function chart(description, ...children) {
    return draw("svg", { class: "chart", role: "img", viewBox: `0 0 ${WIDE} ${HIGH}`, "aria-label": description },
      draw("line", { class: "axis", x1: LEFT, x2: WIDE - RIGHT, y1: HIGH - BELOW, y2: HIGH - BELOW }),
      draw("line", { class: "axis", x1: LEFT, x2: LEFT, y1: TOP, y2: HIGH - BELOW }), ...children);
  }

  const text = (x, y, anchor, content) => draw("text", { x, y, "text-anchor": anchor }, content);

  function titles(across, up) {
    const middle = (TOP + HIGH - BELOW) / 2;
    return [text((LEFT + WIDE - RIGHT) / 2, HIGH - 6, "middle", across),
      draw("text", { "text-anchor": "middle", transform: `translate(13 ${middle}) rotate(-90)` }, up)];
  }

  // Bars of [name, count].
  function bars(counts, across, up) {
    const most = Math.max(1, ...counts.map(([, count]) => count));
    const step = (WIDE - RIGHT - LEFT) / counts.length;
    const described = counts.map(([name, count]) => `${name}: ${count}`).join("; ");
    return chart(`${up} by ${across}. ${described}`, ...titles(across, up), ...counts.flatMap(([name, count], index) => {
      const height = (HIGH - BELOW - TOP - 14) * count / most;
      const [x, y] = [LEFT + step * index, HIGH - BELOW - height];
      return [draw("rect", { class: "fill", x: x + 2, y, width: step - 4, height }),
        text(x + step / 2, y - 3, "middle", count), text(x + step / 2, HIGH - BELOW + 14, "middle", name)];
    }));
  }

  // Round numbers over a range, at most nine.
  function ticks(low, high) {
    const rough = (high - low) / 8 || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
    const found = [];
    for (let at = Math.ceil(low / step); at * step <= high + step * 1e-9; at += 1) found.push(at * step);
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    return found.map((value) => [value, value.toFixed(digits)]);
  }

  // Axes: {title, low, high, ticks: [[value, name]], place(value): what the axis is linear in}.
  // Points: {case, x, y, empty: true for a ring}. Lines: [y, name, how far it stands from the right, and below its line].
  function scatter(description, across, up, points, lines = []) {
    const place = (axis, value, from, to) => {
      const [low, high, here] = [axis.low, axis.high, value].map(axis.place || ((one) => one));
      return high > low ? from + (to - from) * (here - low) / (high - low) : (from + to) / 2;
    };
    const x = (value) => place(across, value, LEFT + 8, WIDE - RIGHT - 8);
    const y = (value) => place(up, value, HIGH - BELOW - 6, TOP + 6);
    return chart(description, ...titles(across.title, up.title),
      ...across.ticks.map(([value, name]) => text(x(value), HIGH - BELOW + 14, "middle", name)),
      ...up.ticks.map(([value, name]) => text(LEFT - 5, y(value) + 4, "end", name)),
      ...lines.flatMap(([value, name, left, down]) => [
        draw("line", { class: "line", x1: LEFT, x2: WIDE - RIGHT, y1: y(value), y2: y(value) }),
        text(WIDE - RIGHT - left, y(value) + down, "end", name)]),
      // The table says the same to those who cannot point; a thousand stops on the way through the page help nobody.
      ...points.map((point) => draw("a", { href: address(point.case), tabindex: -1 },
        draw("circle", { class: point.empty ? "empty" : "dot", cx: x(point.x), cy: y(point.y), r: 4 },
          draw("title", {}, point.case.name)))));
  }

  return { byId, data, make, number, amount, plural, terms, flat, thumbnail, start, picture, bars, ticks, scatter };
})();
