// What scrolls sideways, formulas, code and tables wider than a phone, can be scrolled by keyboard, and shows that it
// goes on.
(function () {
  const WIDE = "main :is(mjx-container[display], pre, .pst-scrollable-table-container, .cell_output > .output)";

  function fade(part) {
    part.classList.toggle("goes-on", part.scrollLeft + part.clientWidth < part.scrollWidth - 1);
  }

  function reach() {
    for (const part of document.querySelectorAll(WIDE)) {
      if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
      else if (part.tabIndex === 0) part.removeAttribute("tabindex");
      fade(part);
    }
  }

  async function start() {
    if (window.MathJax?.startup?.promise) await window.MathJax.startup.promise;
    reach();
    addEventListener("resize", reach);
    addEventListener("scroll", (event) => event.target.matches?.(WIDE) && fade(event.target), true);
    document.addEventListener("toggle", reach, true); // what a fold hid has a width only now
  }

  addEventListener("load", start);
})();

// What the search quotes of a page is its text, not the bar at its top or its list of contents.
addEventListener("DOMContentLoaded", () => {
  if (typeof Search === "undefined") return; // Sphinx's, on the search page alone
  const textOf = Search.htmlToText;
  Search.htmlToText = (html, anchor) => {
    const page = new DOMParser().parseFromString(html, "text/html");
    for (const part of page.querySelectorAll("main :is(.bd-header-article, #jb-print-docs-body, footer)")) part.remove();
    return textOf(page.documentElement.outerHTML, anchor);
  };
});
