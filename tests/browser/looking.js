// What somebody sees of a page: its words where they are, and the colours of all that is drawn.

window.look = (() => {
    const style = it => getComputedStyle(it);
    const around = it => it ? [it, ...around(it.parentElement)] : [];
    const all = query => [...document.querySelectorAll(query)];

    // Only a screen reader reads it, or it waits outside the screen until it has the focus.
    const isUnseen = it => around(it).some(each =>
        style(each).clipPath === 'inset(50%)' || (each.matches('.skip') && !each.matches(':focus')));

    const isShown = it => it.checkVisibility({visibilityProperty: true, opacityProperty: true});

    // The pieces of text, visible or not, and the elements they are in.
    const nodes = function* () {
        const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        while (walker.nextNode()) {
            const it = walker.currentNode.parentElement;
            if (walker.currentNode.data.trim() && !it.closest('title, desc, option'))
                yield [walker.currentNode, it];
        }
    };

    // The lines of all text that is visible, and the parts of them that no scrolling region hides.
    const lines = () => {
        const found = [];
        const range = document.createRange();
        for (const [node, it] of nodes()) {
            if (!isShown(it) || isUnseen(it)) continue;
            range.selectNodeContents(node);
            const text = node.data.trim().slice(0, 60);
            const frames = around(it).filter(each => style(each).overflow !== 'visible');
            for (const {left, right, top, bottom} of range.getClientRects()) {
                if (right > left) found.push({node, it, text, frames, left, right, top, bottom});
            }
        }
        return found;
    };

    // A region that the keyboard reaches and a screen reader names may scroll by itself.
    const scrolls = it => it.matches('[role=region][aria-labelledby][tabindex="0"]');

    const cut = found => found.filter(line => line.frames.some(frame => {
        const {left, right, top, bottom} = frame.getBoundingClientRect();
        return frame.localName !== 'body' && !scrolls(frame) && (line.left < left - 1
            || line.right > right + 1 || line.top < top - 3 || line.bottom > bottom + 3);
    })).map(line => line.text);

    // A select shows what is chosen beside its arrow.
    const cutChoices = () => all('select').filter(isShown).filter(it => {
        const pen = document.createElement('canvas').getContext('2d');
        const {font, paddingLeft, paddingRight} = style(it);
        pen.font = font;
        const room = it.clientWidth - parseFloat(paddingLeft) - parseFloat(paddingRight);
        return pen.measureText(it.selectedOptions[0].label).width > room;
    }).map(it => it.selectedOptions[0].label);

    const beyond = found => found
        .filter(line => line.frames.every(frame => !scrolls(frame)))
        .filter(line => line.left < 0 || line.right > innerWidth + 0.5)
        .map(line => line.text);

    // Text of a chart that is outside of its section, where other text may be.
    const astray = found => found.filter(line => line.it.closest('figure')).filter(line => {
        const {left, right} = line.it.closest('section').getBoundingClientRect();
        return line.left < left - 1 || line.right > right + 1;
    }).map(line => line.text);

    const overlaps = found => {
        const boxes = found.map(line => {
            const box = {...line};
            for (const frame of line.frames.filter(scrolls)) {
                const {left, right, top, bottom} = frame.getBoundingClientRect();
                box.left = Math.max(box.left, left);
                box.right = Math.min(box.right, right);
                box.top = Math.max(box.top, top);
                box.bottom = Math.min(box.bottom, bottom);
            }
            const leading = (box.bottom - box.top) * 0.15;
            return {...box, top: box.top + leading, bottom: box.bottom - leading};
        }).filter(box => box.right > box.left && box.bottom > box.top);
        boxes.sort((one, other) => one.top - other.top);
        const pairs = [];
        boxes.forEach((one, n) => {
            for (let next = n + 1; next < boxes.length && boxes[next].top < one.bottom; next++) {
                const other = boxes[next];
                const apart = other.left > one.right - 0.5 || one.left > other.right - 0.5;
                if (one.node !== other.node && !apart) pairs.push([one.text, other.text]);
            }
        });
        return pairs;
    };

    const layout = () => {
        const found = lines();
        return {
            lines: found.length,
            sideways: Math.max(0, document.documentElement.scrollWidth - innerWidth),
            cut: [...cut(found), ...cutChoices()],
            beyond: beyond(found),
            astray: astray(found),
            overlaps: overlaps(found),
            keys: all('.keys').filter(isShown).filter(it =>
                it.getBoundingClientRect().bottom
                > it.parentElement.querySelector('.chart').getBoundingClientRect().top + 0.5
            ).map(it => it.textContent.trim()),
        };
    };

    const open = isOpen => all('details').forEach(it => { it.open = isOpen; });
    const enlarge = percent => { document.documentElement.style.fontSize = `${percent}%`; };

    // Colours, and their contrast as WCAG 2 defines it.
    const parts = colour => {
        const [r, g, b, alpha = 1] = colour.match(/[\d.]+/g).map(Number);
        return [r, g, b, alpha];
    };
    const light = ([r, g, b]) => {
        const [red, green, blue] = [r, g, b].map(n => n / 255)
            .map(n => n <= 0.04045 ? n / 12.92 : ((n + 0.055) / 1.055) ** 2.4);
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    };
    const contrast = (one, other) => {
        const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
    };
    const behind = it => {
        for (const each of around(it)) {
            const colour = parts(style(each).backgroundColor);
            if (colour[3]) return colour;
        }
        return [255, 255, 255, 1];
    };
    const textColour = it => parts(it instanceof SVGElement ? style(it).fill : style(it).color);

    const words = () => [...new Set([...nodes()].map(([, it]) => it).concat(all('select')))]
        .map(it => [it.className?.baseVal ?? it.className, it.localName,
            it.textContent.trim().slice(0, 40), contrast(textColour(it), behind(it))]);

    const named = it => `${it.localName}.${it.getAttribute('class') ?? ''}`;
    const marks = () => {
        const found = [];
        const add = (it, colour, other) => found.push([named(it), contrast(parts(colour), other)]);
        for (const it of all('path'))
            add(it, style(it).stroke === 'none' ? style(it).fill : style(it).stroke, behind(it));
        for (const it of all('circle, rect:not(.track)')) add(it, style(it).fill, behind(it));
        for (const it of all('rect:not(.track)'))
            add(it, style(it).fill, parts(style(it.parentElement.querySelector('.track')).fill));
        for (const it of all('select, button')) add(it, style(it).borderTopColor, behind(it.parentElement));
        return found;
    };

    const outline = () => contrast(parts(style(outlined()).outlineColor), behind(document.body));
    const outlined = () => around(document.activeElement)
        .find(it => style(it).outlineStyle === 'solid');

    return {all, style, isShown, layout, open, enlarge, words, marks, outline,
        paper: () => light(parts(style(document.body).backgroundColor)),
        ink: () => light(textColour(document.body))};
})();
