// With a script the arrow keys and Escape work as the links of the open image do, and leave no history.
addEventListener("keydown", (event) => {
  const link = document.querySelector(`.cell:target [data-key="${CSS.escape(event.key)}"]`);
  if (!link || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  location.replace(link.href);
});
// Browsers that do not unfold by themselves what a link leads to.
addEventListener("hashchange", () => {
  const target = document.querySelector(":target");
  const folded = target?.closest("details:not([open])");
  if (folded) {
    folded.open = true;
    target.scrollIntoView();
  }
});
