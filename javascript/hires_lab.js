// Names the chosen method in the accordion's header, so that a closed accordion still tells what is on.

(function() {
    const HEADER = '[id^="script_"][id$="_hires_lab_accordion"]';

    function chosenMethod(accordion) {
        const input = gradioApp().querySelector('#' + accordion.id.replace(/accordion$/, 'method') + ' input');
        return input ? input.value : '';
    }

    function badgeOf(accordion) {
        const label = accordion.querySelector('.label-wrap > span');
        if (!label) return null;
        let badge = label.querySelector('.hires-lab-badge');
        if (!badge) {
            badge = document.createElement('span');
            badge.className = 'hires-lab-badge';
            label.appendChild(badge);
        }
        return badge;
    }

    function refresh() {
        for (const accordion of gradioApp().querySelectorAll(HEADER)) {
            const badge = badgeOf(accordion);
            if (!badge) continue;
            const enabled = accordion.querySelector('.input-accordion-checkbox');
            const text = enabled && enabled.checked ? chosenMethod(accordion) : '';
            if (badge.textContent !== text) badge.textContent = text; // writing the same text would call us again
        }
    }

    if (typeof onAfterUiUpdate === 'function') onAfterUiUpdate(refresh);
    document.addEventListener('input', () => setTimeout(refresh, 0)); // a checkbox changes nothing in the page's tree
})();
