"use strict";
// Examples may contain anything, so everything is set as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SIZE = 50; // rows on a page
  const $ = (id) => document.getElementById(id);
  const train = data.train, queries = data.queries;
  const key = "lightning-influence:" + document.body.dataset.digest;
  let marks = new Map(), view = "train", query = null, sort = null, order = [], page = 0;

  try { marks = new Map(JSON.parse(localStorage.getItem(key) || "[]")); } catch { /* the browser stores nothing */ }

  const make = (name, text, cls) => {
    const node = document.createElement(name);
    if (text !== undefined) node.textContent = text;
    if (cls) node.className = cls;
    return node;
  };
  const side = () => (view === "train" ? train : queries);
  const nameOf = (of, i) => of.id[i] + (of.base && of.base[i] !== of.id[i] ? ` (base ${of.base[i]})` : "");
  const lookOf = (of, i) => of.looks[i] || {};
  const number = (value) => (value === null || value === undefined ? "–"
    : (value > 0 ? "+" : "") + (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e6 || value === 0
      ? String(Number.isInteger(value) ? value : Number(value.toPrecision(4))) : value.toExponential(3)));
  const isWrong = (of, i) => of.judged && lookOf(of, i).right === false;
  const plain = (value) => (value === null || value === undefined ? "–" : number(value).replace(/^\+/, ""));

  // ---- the columns of both views: title, value by row, and format

  let onQuery = new Map();
  const trainColumns = () => {
    const scores = query === null ? [] : [{ title: `Influence on query ${nameOf(queries, query)}`, signed: true,
      get: (i) => onQuery.get(i) }];
    return scores.concat(train.columns.map((column) => ({ title: column.title,
      signed: column.title.startsWith("Influence"), get: (i) => column.scores[i] })));
  };
  const ends = queries ? queries.pairs.map((pairs) => pairs.reduce(
    (ends, pair) => [Math.max(ends[0], pair[1]), Math.min(ends[1], pair[1])], [0, 0])) : [];
  const queryColumns = [
    { title: "Strongest proponent", signed: true, get: (i) => ends[i][0] },
    { title: "Strongest opponent", signed: true, get: (i) => ends[i][1] },
  ];
  const columns = () => (view === "train" ? trainColumns() : queryColumns);
  const hasLooks = (of) => Object.values(of.looks).some((look) => look.kind !== "nothing");
  // What is known of examples beside their scores: key in their looks, title, and whether it is a number.
  const KNOWN = [["class", "Class"], ["prediction", "Predicted"], ["probability", "Probability", true], ["loss", "Final loss", true]];
  const valuesOf = (of, key) => [...new Set(Object.values(of.looks).map((look) => look[key]).filter((value) => value !== undefined))];
  const MANY = 30; // classes without names, from which on they are taken as numbers
  const numbers = (names) => names.every((name) => name !== "" && Number.isFinite(Number(name)))
    && (names.length > MANY || names.some((name) => !Number.isInteger(Number(name))));
  const sides = [train, queries].filter((of) => of);
  const classes = new Set(sides.flatMap((of) => valuesOf(of, "class")));
  for (const of of sides) {
    // A prediction that was given is wrong if it is another of the classes that examples have.
    for (const look of Object.values(of.looks))
      if (look.right === undefined && look.loss === undefined && look.class !== undefined && classes.has(look.prediction))
        look.right = look.prediction === look.class;
    of.judged = valuesOf(of, "right").length > 0;
  }
  // Targets of a regression are numbers, which are sorted as such and have a range instead of a list.
  const regression = !sides.some((of) => valuesOf(of, "probability").length)
    && sides.some((of) => numbers(valuesOf(of, "class")) || numbers(valuesOf(of, "prediction")));
  for (const of of sides) {
    of.targets = regression;
    if (regression) of.judged = false;
    if (regression) for (const look of Object.values(of.looks))
      for (const key of ["class", "prediction"]) if (look[key] !== undefined && Number.isFinite(Number(look[key]))) look[key] = Number(look[key]);
  }
  const said = (decision) => (train.targets ? decision.replace("label", "target") : decision); // in the file it is one word
  const knownOf = (of) => KNOWN.filter(([key]) => valuesOf(of, key).length).map(([key, title, numeric]) => (
    of.targets && key === "class" ? [key, "Target", true] : of.targets && key === "prediction" ? [key, title, true] : [key, title, numeric]));
  const extras = new Map(sides.map((of) => [of, knownOf(of)]));

  const fields = () => {
    const of = side(), made = [{ key: "id", title: "Id", get: (i) => of.id[i] }];
    for (const [key, title, numeric] of extras.get(of))
      made.push({ key, title, numeric, get: (i) => lookOf(of, i)[key] });
    columns().forEach((column, at) => made.push({ ...column, key: "score" + at }));
    return made;
  };

  // ---- filtering and sorting

  const textOf = (of, i) => {
    const look = lookOf(of, i);
    const value = look.kind === "text" ? look.value : look.kind === "row" ? look.value.flat().join(" ") : "";
    return `${nameOf(of, i)} ${value}`.toLowerCase();
  };
  const compare = (a, b) => {
    const [none, other] = [a === undefined || a === null, b === undefined || b === null];
    if (none || other) return none - other;
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), undefined, { numeric: true });
  };

  function arrange() {
    const of = side(), known = fields(), wanted = $("class").value, decided = $("decided").value;
    const low = $("low").valueAsNumber, high = $("high").valueAsNumber, find = $("find").value.trim().toLowerCase();
    const score = known.find((field) => field.key === $("ranged").value);
    let rows = view === "train" && query !== null ? [...onQuery.keys()] : of.id.map((_, i) => i);
    rows = rows.filter((i) => {
      if (wanted && lookOf(of, i).class !== wanted.slice(1)) return false;
      if (score && (low > score.get(i) || high < score.get(i))) return false;
      if (score && !(Number.isNaN(low) && Number.isNaN(high)) && score.get(i) == null) return false;
      if (view === "train" && decided && (marks.get(of.id[i]) || "none") !== decided) return false;
      return !find || String(of.id[i]) === find || textOf(of, i).includes(find);
    });
    // Queries that tell most come first: the wrongly predicted ones, then those of highest loss.
    const telling = { key: "telling", get: (i) => lookOf(of, i).loss };
    const first = view === "queries" && extras.get(of).length && (of.judged || valuesOf(of, "loss").length) ? telling : known.find((f) => f.key === "score0");
    const by = sort && known.find((field) => field.key === sort.key) || first || known[0];
    // Suspicious examples come first: the highest self-influence, or the strongest opponent of all queries.
    const suspicious = view === "train" && query === null && by.key === "score0" && by.signed;
    const down = sort && sort.key === by.key ? sort.down : by === telling || by.key.startsWith("score") && !suspicious;
    sort = { key: by.key, down };
    rows.sort((a, b) => {
      const [x, y] = [by.get(a), by.get(b)];
      const wrong = by === telling ? isWrong(of, b) - isWrong(of, a) : 0;
      if (wrong) return wrong;
      const none = (x === undefined || x === null) - (y === undefined || y === null);
      return none || (down ? compare(y, x) : compare(x, y)) || a - b; // unknown values come last in both directions
    });
    order = rows;
    page = Math.min(page, Math.max(0, Math.ceil(order.length / SIZE) - 1));
    draw();
  }

  // ---- drawing: one page of rows at a time

  const about = (of, look) => [look.class === undefined ? "" : `, ${of.targets ? "target" : "class"} ${look.class}`,
    look.prediction === undefined ? "" : `, predicted ${look.prediction}`].join("");

  function drawLook(look, name) {
    const box = make("div", undefined, "look");
    if (look.kind === "image") {
      const image = make("img");
      image.src = "data:image/png;base64," + look.value;
      image.alt = name;
      box.append(image);
    } else if (look.kind === "text") {
      const text = make("div", look.value, "text");
      text.dir = "auto";
      box.append(text);
    } else if (look.kind === "row") {
      const list = make("dl");
      for (const [title, value] of look.value) {
        const pair = make("div");
        const dd = make("dd", value);
        dd.dir = "auto";
        pair.append(make("dt", title), dd);
        list.append(pair);
      }
      box.append(list);
    } else if (look.kind === "curve") {
      const space = "http://www.w3.org/2000/svg", svg = document.createElementNS(space, "svg");
      const line = document.createElementNS(space, "polyline"), values = look.value;
      const low = Math.min(...values), high = Math.max(...values), range = high - low || 1;
      svg.setAttribute("viewBox", "0 0 100 100");
      svg.setAttribute("preserveAspectRatio", "none");
      svg.setAttribute("role", "img");
      svg.setAttribute("aria-label", name);
      line.setAttribute("points", values.map((v, x) =>
        `${(100 * x) / Math.max(1, values.length - 1)},${96 - (92 * (v - low)) / range}`).join(" "));
      svg.append(line);
      box.append(svg);
    }
    return box;
  }

  function cell(field, i, row) {
    const value = field.get(i), td = make("td");
    td.dataset.title = field.title;
    if (field.key === "id") {
      td.append(make("span", nameOf(side(), i)));
    } else if (field.key.startsWith("score")) {
      td.className = "number" + (field.signed && value > 0 ? " positive" : field.signed && value < 0 ? " negative" : "");
      td.append(make("span", field.signed ? number(value) : plain(value)));
    } else if (field.numeric) {
      td.className = "number";
      td.append(make("span", plain(value)));
    } else {
      td.append(make("bdi", value === undefined ? "–" : value));
      if (field.key === "prediction" && isWrong(side(), i)) {
        td.className = "negative";
        td.append(make("span", " (wrong)", "hidden-text")); // colour alone says nothing to a screen reader
      }
    }
    row.append(td);
  }

  function marksOf(i) {
    const td = make("td", undefined, "marks"), id = train.id[i];
    for (const word of data.decisions) {
      const button = make("button", said(word), word.replace(" ", "-"));
      button.type = "button";
      button.setAttribute("aria-pressed", String(marks.get(id) === word));
      button.setAttribute("aria-label", `${said(word)}: training example ${id}`);
      button.addEventListener("click", () => mark(i, marks.get(id) === word ? null : word));
      td.append(button);
    }
    return td;
  }

  function drawRow(i, known, looks) {
    const row = make("tr"), of = side();
    row.tabIndex = -1;
    row.dataset.at = i;
    cell(known[0], i, row);
    if (looks) {
      const td = make("td");
      td.append(drawLook(lookOf(of, i), `${view === "train" ? "training example" : "query"} ${of.id[i]}${about(of, lookOf(of, i))}`));
      row.append(td);
    }
    for (const field of known.slice(1)) cell(field, i, row);
    if (view === "train") {
      row.append(marksOf(i));
    } else {
      const td = make("td"), button = make("button", "Explain");
      button.type = "button";
      button.setAttribute("aria-label", `Explain query ${of.id[i]}`);
      button.addEventListener("click", () => explain(i));
      td.append(button);
      row.append(td);
    }
    return row;
  }

  // What the numbers in the table say, in a sentence or two.
  function caption() {
    const unit = data.units === "arbitrary" ? "The scores rank, they have no unit" : `Unit of the scores: ${data.units}`;
    if (view === "queries") return `The highest and the lowest score that a training example has on each query. ${unit}.`;
    const own = train.columns.filter((column) => column.meaning && !(query !== null && column.title.startsWith("Influence")));
    const said = own.map((column) => `${column.title}: ${column.meaning}`);
    if (query !== null) said.unshift(`Influence on query ${nameOf(queries, query)}: above 0, training on the example made this query better, below 0 worse. ${unit}.`);
    return said.join(" ");
  }

  function draw(focus) {
    const known = fields(), looks = hasLooks(side()), head = $("head");
    head.replaceChildren();
    const title = (field) => {
      const th = make("th"), button = make("button", field.title);
      th.scope = "col";
      th.setAttribute("aria-sort", sort.key !== field.key ? "none" : sort.down ? "descending" : "ascending");
      button.type = "button";
      button.addEventListener("click", () => {
        sort = { key: field.key, down: sort.key === field.key ? !sort.down : field.numeric || field.key.startsWith("score") };
        page = 0;
        arrange();
        head.querySelectorAll("button")[known.findIndex((f) => f.key === field.key)].focus();
      });
      th.append(button);
      return th;
    };
    head.append(title(known[0]));
    if (looks) head.append(make("th", "Example"));
    head.append(...known.slice(1).map(title), make("th", view === "train" ? "Decision" : "Explanation"));
    const shown = order.slice(page * SIZE, (page + 1) * SIZE), pages = Math.max(1, Math.ceil(order.length / SIZE));
    $("rows").classList.toggle("crowded", known.length > 6);
    $("rows").replaceChildren(...shown.map((i) => drawRow(i, known, looks)));
    $("caption").textContent = caption();
    const first = $("rows").firstElementChild;
    if (first) first.tabIndex = 0;
    const total = side().id.length, one = (total === 1 ? ["training example", "query"] : ["training examples", "queries"]);
    const what = one[view === "train" ? 0 : 1];
    $("status").textContent = order.length
      ? `${(page * SIZE + 1).toLocaleString("en")} to ${(page * SIZE + shown.length).toLocaleString("en")} of `
        + `${order.length.toLocaleString("en")} ${what}` + (order.length < total ? ` (${total.toLocaleString("en")} in all)` : "")
        + (sort.key === "telling" ? (side().judged ? ", wrongly predicted ones first, then by loss" : ", highest loss first") : "")
      : `No ${what} fit these filters.`;
    $("page").value = page + 1;
    $("page").max = pages;
    $("last-page").textContent = `of ${pages.toLocaleString("en")}`;
    for (const [id, off] of [["first", page === 0], ["previous", page === 0], ["next", page >= pages - 1], ["last", page >= pages - 1]])
      $(id).disabled = off;
    if (focus !== undefined) focusRow(focus < 0 ? shown.length - 1 : focus);
  }

  function focusRow(at) {
    const rows = $("rows").children;
    if (!rows[at]) return;
    for (const row of rows) row.tabIndex = -1;
    rows[at].tabIndex = 0;
    rows[at].focus();
  }

  function turn(to, focus) {
    const pages = Math.max(1, Math.ceil(order.length / SIZE));
    page = Math.min(Math.max(0, to), pages - 1);
    draw(focus);
  }

  // ---- decisions

  function mark(i, word) {
    const id = train.id[i];
    if (word) marks.set(id, word); else marks.delete(id);
    try { localStorage.setItem(key, JSON.stringify([...marks])); } catch { /* then the decisions last as long as the page */ }
    const row = $("rows").querySelector(`tr[data-at="${i}"]`);
    if (row) {
      const within = row.contains(document.activeElement) && document.activeElement !== row
        ? [...row.querySelectorAll(".marks button")].indexOf(document.activeElement) : -1;
      row.querySelector(".marks").replaceWith(marksOf(i));
      if (within >= 0) row.querySelectorAll(".marks button")[within].focus();
    }
    count();
  }

  function count() {
    const found = data.decisions.map((word) => [word, [...marks.values()].filter((other) => other === word).length]);
    $("marked").textContent = marks.size ? "Decisions: " + found.map(([word, n]) => `${n} ${said(word)}`).join(", ") + "." : "No decisions yet.";
    $("download").disabled = !marks.size;
  }

  function download() {
    const lines = ["train_id,train_base_id,decision"];
    train.id.forEach((id, i) => {
      if (marks.has(id)) lines.push(`${id},${train.base ? train.base[i] : id},${marks.get(id)}`);
    });
    const link = make("a"), url = URL.createObjectURL(new Blob([lines.join("\r\n") + "\r\n"], { type: "text/csv" }));
    link.href = url;
    link.download = "decisions.csv";
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  }

  // ---- views

  function options(select, names, chosen) {
    select.replaceChildren(select.firstElementChild, ...names.map(([value, name]) => {
      const option = make("option", name);
      option.value = value;
      return option;
    }));
    select.value = chosen;
  }

  function show(which) {
    clear();
    view = which;
    sort = null;
    page = 0;
    $("view-train").setAttribute("aria-pressed", String(view === "train"));
    if (queries) $("view-queries").setAttribute("aria-pressed", String(view === "queries"));
    document.querySelectorAll(".of-train").forEach((node) => node.classList.toggle("hidden", view !== "train"));
    const names = side().targets ? [] : valuesOf(side(), "class");
    // The prefix distinguishes the class "" from no filter at all.
    $("class").parentElement.classList.toggle("hidden", !names.length);
    options($("class"), names.sort(compare).map((name) => ["=" + name, name]), "");
    choose(query);
  }

  function choose(i) {
    query = queries ? i : null;
    onQuery = new Map(query === null ? [] : queries.pairs[query]);
    if (queries) $("query").value = query === null ? "" : String(query);
    const box = $("subject");
    box.hidden = query === null || view !== "train";
    if (!box.hidden) {
      const look = lookOf(queries, query), words = make("div");
      words.append(make("strong", `Query ${nameOf(queries, query)}`));
      if (look.class !== undefined) words.append(make("div"), make("span", queries.targets ? "target " : "class "), make("bdi", String(look.class)));
      if (look.prediction !== undefined) {
        words.append(make("div"), make("span", "predicted "), make("bdi", String(look.prediction), isWrong(queries, query) ? "negative" : ""));
        if (isWrong(queries, query)) words.append(" (wrong)");
        if (look.probability !== undefined) words.append(make("span", `, probability ${plain(look.probability)}`));
      }
      if (look.loss !== undefined) words.append(make("div", `loss ${plain(look.loss)}`));
      words.append(make("div", "Positive: a proponent, which made this query better. Negative: an opponent.", "soft"));
      box.replaceChildren(drawLook(look, `query ${queries.id[query]}${about(queries, look)}`), words);
    }
    sort = null;
    page = 0;
    const ranges = fields().filter((field) => field.numeric || field.key.startsWith("score"));
    ranges.sort((a, b) => b.key.startsWith("score") - a.key.startsWith("score"));
    $("ranged").replaceChildren(...ranges.map((field) => Object.assign(make("option", field.title), { value: field.key })));
    arrange();
  }

  function clear() {
    for (const id of ["class", "decided", "low", "high", "find"]) $(id).value = "";
  }

  function explain(i) {
    query = i;
    show("train");
    focusRow(0);
  }

  // ---- wiring

  $("view-train").addEventListener("click", () => show("train"));
  if (queries) {
    $("view-queries").addEventListener("click", () => show("queries"));
    options($("query"), queries.id.map((_, i) => {
      const look = lookOf(queries, i);
      const more = [look.class, look.prediction === undefined ? undefined : `predicted ${look.prediction}`].filter((x) => x !== undefined);
      return [String(i), [nameOf(queries, i), ...more].join(" · ")];
    }), "");
    $("query").addEventListener("change", (event) => choose(event.target.value === "" ? null : Number(event.target.value)));
  }
  options($("decided"), data.decisions.map((word) => [word, said(word)]), "");
  $("first-decision").textContent = said(data.decisions[0]);
  $("decided").append(Object.assign(make("option", "none yet"), { value: "none" }));
  for (const id of ["class", "decided", "ranged", "low", "high", "find"])
    $(id).addEventListener("input", () => { page = 0; arrange(); });
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("clear").addEventListener("click", () => { clear(); choose(null); });
  $("first").addEventListener("click", () => turn(0));
  $("previous").addEventListener("click", () => turn(page - 1));
  $("next").addEventListener("click", () => turn(page + 1));
  $("last").addEventListener("click", () => turn(Infinity));
  $("page").addEventListener("change", (event) => turn((event.target.valueAsNumber || 1) - 1));
  $("download").addEventListener("click", download);

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select")) return;
    const row = event.target.closest("#rows tr"), at = row ? [...$("rows").children].indexOf(row) : -1;
    const last = $("rows").children.length - 1, word = data.decisions[Number(event.key) - 1];
    if (event.key === "/") $("find").focus();
    else if (event.key === "j" || event.key === "ArrowDown" && row) {
      if (at < last) focusRow(at + 1); else if (!$("next").disabled) turn(page + 1, 0);
    } else if (event.key === "k" || event.key === "ArrowUp" && row) {
      if (at > 0) focusRow(at - 1); else if (!$("previous").disabled) turn(page - 1, -1);
    } else if (event.key === "n") turn(page + 1, 0);
    else if (event.key === "p") turn(page - 1, 0);
    else if (row && view === "train" && (word || event.key === "0")) mark(Number(row.dataset.at), word || null);
    else if (row && view === "queries" && event.key === "Enter" && event.target === row) explain(Number(row.dataset.at));
    else return;
    event.preventDefault();
  });

  count();
  show("train");
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
})();
