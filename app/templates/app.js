() => {
  // The arena's keys. They click the buttons that are shown, so that keyboard and mouse are one thing.
  const keys = {ArrowLeft: "rd-left", ArrowRight: "rd-right", ArrowUp: "rd-tie", ArrowDown: "rd-bad"};
  document.addEventListener("keydown", (event) => {
    const writing = event.target.closest("input, textarea, select, [contenteditable]");
    const button = document.getElementById(keys[event.key]);
    if (writing || event.repeat || event.ctrlKey || event.metaKey || event.altKey || !button) return;
    if (button.offsetParent === null || button.disabled) return;
    event.preventDefault();
    event.stopPropagation();
    button.click();
  }, true);
}
