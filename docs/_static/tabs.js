// A link to a tab, or to something in it, opens the tab.
function openTab() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const content = target?.closest(".sd-tab-content");
  const label = content ? content.previousElementSibling : target;
  if (label?.matches(".sd-tab-label")) {
    label.control.checked = true;
    target.scrollIntoView();
  }
}
addEventListener("hashchange", openTab);
openTab();
