// Before anything is drawn, so that a dark page does not begin white. The choice is one of this browser.
(() => {
  try {
    const theme = localStorage.getItem("nanochat_pl.theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch {
    // Storage is blocked: the system's theme it is.
  }
})();
