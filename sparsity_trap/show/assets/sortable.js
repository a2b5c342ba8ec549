// Sorts the tables of a page by the column whose heading is pressed; undefined values stay last.
(() => {
  const text = (row, column) => row.cells[column].textContent.trim();

  function compare(a, b) {
    const [x, y] = [a, b].map((t) => Number(t.replace("−", "-")));
    const [noX, noY] = [Number.isNaN(x), Number.isNaN(y)];
    return noX || noY ? a.localeCompare(b) : x - y;
  }

  function sort(table, column, heading) {
    const down = heading.getAttribute("aria-sort") !== "descending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const unknown = (row) => ["undefined", "–", ""].includes(text(row, column));
    const rows = [...table.tBodies[0].rows];
    rows.sort((r, s) => unknown(r) - unknown(s)
      || (down ? -1 : 1) * compare(text(r, column), text(s, column)));
    table.tBodies[0].append(...rows);
  }

  for (const table of document.querySelectorAll("table.sortable:not([data-ready])")) {
    table.dataset.ready = "";
    [...table.tHead.rows[0].cells].forEach((heading, column) => {
      const button = document.createElement("button");
      button.append(...heading.childNodes);
      button.title = "sort by this column";
      button.addEventListener("click", () => sort(table, column, heading));
      heading.append(button);
    });
  }
})();
