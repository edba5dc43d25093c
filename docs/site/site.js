// What scrolls sideways can be reached by the keyboard, and the search has a name.
const reach = () => {
  document.querySelector('.md-search[role=dialog]')?.setAttribute('aria-label', 'Search');
  document.querySelectorAll('.md-typeset pre > code, .md-typeset__scrollwrap').forEach(part => {
    if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
  });
  document.querySelectorAll('.md-code__nav').forEach((bar, i) => bar.setAttribute('aria-label', `Code ${i + 1}`));
};
addEventListener('load', () => setTimeout(reach));
addEventListener('resize', reach);
