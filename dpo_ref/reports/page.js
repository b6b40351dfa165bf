// What a reader can do with a page: sort its tables, search and sort its answers. The page reads the same without it.
"use strict";
(() => {
  const LEADING_NUMBER = /^[<>≤≥≈]?\s*([+\-−]?\d[\d,]*(?:\.\d+)?(?:e[+\-−]?\d+)?)/i;
  const PAGE_OF_ANSWERS = 8;

  const element = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const choice = (label, options) => {
    const select = element("select", { ariaLabel: label });
    select.append(...options.map((text, value) => element("option", { value, textContent: text })));
    return select;
  };

  // ---- tables ----
  const shown = (cell) => cell.textContent.trim();
  const numberIn = (cell) => {
    const found = LEADING_NUMBER.exec(cell.dataset.sort ?? shown(cell));
    return found ? Number(found[1].replaceAll("−", "-").replaceAll(",", "")) : NaN;
  };

  // Rows without a value in the column stay behind the others, whichever way it is sorted.
  const sortRows = (table, column, descending) => {
    const body = table.tBodies[0];
    const keyed = [...body.rows].map((row) => ({ row, cell: row.cells[column] }));
    const numeric = keyed.some(({ cell }) => cell && !Number.isNaN(numberIn(cell)));
    const missing = ({ cell }) => !cell || cell.colSpan > 1 || (numeric ? Number.isNaN(numberIn(cell)) : !shown(cell));
    const compare = numeric
      ? (a, b) => numberIn(a.cell) - numberIn(b.cell)
      : (a, b) => shown(a.cell).localeCompare(shown(b.cell), undefined, { numeric: true });
    keyed.sort((a, b) => missing(a) - missing(b) || (missing(a) ? 0 : compare(a, b) * (descending ? -1 : 1)));
    body.append(...keyed.map(({ row }) => row));
  };

  const makeSortable = (table) => {
    const heads = [...table.tHead.rows[0].cells];
    const names = heads.map(shown);
    const isText = (column) => [...table.tBodies[0].rows].every(
      (row) => !row.cells[column] || row.cells[column].tagName === "TH" || Number.isNaN(numberIn(row.cells[column])));
    const columns = choice("Sort by", names);
    const direction = element("button", { type: "button" });
    let current = { column: 0, descending: false };

    const sortBy = (column, descending) => {
      current = { column, descending };
      sortRows(table, column, descending);
      heads.forEach((head, place) => {
        if (place === column) head.ariaSort = descending ? "descending" : "ascending";
        else head.removeAttribute("aria-sort");
      });
      columns.value = String(column);
      direction.textContent = descending ? "highest first" : "lowest first";
    };
    heads.forEach((head, column) => {
      const button = element("button", { type: "button", title: head.title });
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const again = head.ariaSort !== null;
        sortBy(column, again ? !current.descending : !isText(column));
      });
    });
    columns.addEventListener("change", () => sortBy(Number(columns.value), !isText(Number(columns.value))));
    direction.addEventListener("click", () => sortBy(current.column, !current.descending));
    direction.textContent = "lowest first";
    table.parentElement.before(element("div", { className: "sorter" }, element("label", {}, "Sort by ", columns), direction));
    table.classList.add("sortable");
  };

  // ---- answers side by side ----
  const ORDERS = [
    ["As drawn"],
    ["Gain: largest first", "gain", -1],
    ["Gain: smallest first", "gain", 1],
    ["Score: highest first", "score", -1],
    ["Score: lowest first", "score", 1],
    ["Length: longest first", "tokens", -1],
    ["Length: shortest first", "tokens", 1],
    ["Growth in length: largest first", "growth", -1],
    ["Growth in length: smallest first", "growth", 1],
  ];
  const FILTERS = [
    ["All answers", () => true],
    ["Scored better", (data) => Number(data.gain) > 0],
    ["Scored worse", (data) => Number(data.gain) < 0],
    ["Scored equal", (data) => Number(data.gain) === 0],
    ["Cut at the limit", (data) => "cut" in data],
  ];

  const makeSearchable = (list) => {
    const drawn = [...list.children];
    const samples = drawn.filter((child) => child.matches(".sample"));
    const words = new Map(samples.map((sample) => [sample, sample.textContent.toLowerCase()]));
    const search = element("input", { type: "search", placeholder: "Search prompts and answers", ariaLabel: "Search" });
    const orders = choice("Order of the answers", ORDERS.map(([name]) => name));
    const filters = choice("Which answers", FILTERS.map(([name]) => name));
    const count = element("output", {});
    const more = element("button", { type: "button", className: "more" });
    const headings = drawn.filter((child) => !samples.includes(child)).map((heading) => {
      const after = drawn.slice(drawn.indexOf(heading) + 1);
      const next = after.findIndex((child) => !samples.includes(child));
      return { heading, members: next < 0 ? after : after.slice(0, next) };
    });
    let limit = PAGE_OF_ANSWERS;

    const value = (sample, key, sign) => (sample.dataset[key] ? sign * Number(sample.dataset[key]) : Infinity);
    const update = () => {
      const [, key, sign] = ORDERS[Number(orders.value)];
      const wanted = search.value.trim().toLowerCase();
      const keep = FILTERS[Number(filters.value)][1];
      const byKey = (a, b) => value(a, key, sign) - value(b, key, sign) || 0; // Infinity - Infinity is no order
      const ordered = key ? [...samples].sort(byKey) : drawn;
      list.append(...ordered);
      const found = ordered.filter((child) => words.get(child)?.includes(wanted) && keep(child.dataset));
      const visible = new Set(found.slice(0, limit));
      samples.forEach((sample) => { sample.hidden = !visible.has(sample); });
      headings.forEach(({ heading, members }) => {
        heading.hidden = key !== undefined || !members.some((member) => visible.has(member));
      });
      count.textContent = `${visible.size} of ${found.length} shown`;
      more.textContent = `Show ${Math.min(PAGE_OF_ANSWERS, found.length - visible.size)} more`;
      more.hidden = found.length === visible.size;
    };
    const restart = () => { limit = PAGE_OF_ANSWERS; update(); };
    search.addEventListener("input", restart);
    orders.addEventListener("change", restart);
    filters.addEventListener("change", restart);
    more.addEventListener("click", () => { limit += PAGE_OF_ANSWERS; update(); });
    list.before(element("div", { className: "finder" }, search, orders, filters, count));
    list.after(more);
    update();
  };

  document.querySelectorAll("table.numbers").forEach((table) => {
    if (table.tHead?.rows.length === 1 && table.tBodies[0]?.rows.length > 1) makeSortable(table);
  });
  document.querySelectorAll(".comparisons").forEach(makeSearchable);
})();
