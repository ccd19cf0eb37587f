// What scrolls sideways can be reached and scrolled by keyboard: formulas, code and tables that are wider than a phone.
(function () {
  const WIDE = "main :is(mjx-container[display], pre, .pst-scrollable-table-container)";

  function reach() {
    for (const part of document.querySelectorAll(WIDE)) {
      if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
      else if (part.tabIndex === 0) part.removeAttribute("tabindex");
    }
  }

  async function start() {
    if (window.MathJax?.startup?.promise) await window.MathJax.startup.promise;
    reach();
    addEventListener("resize", reach);
    document.addEventListener("toggle", reach, true); // what a fold hid has a width only now
  }

  addEventListener("load", start);
})();
