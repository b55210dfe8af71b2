// Flags stay whole, paths and lists break after their signs; cells of figures are marked; pictures open in full size.
for (const code of document.querySelectorAll("article :not(pre) > code"))
  if (!code.children.length)
    code.innerHTML = code.innerHTML.replace(/(^|[\s(\[])(--?[A-Za-z][\w.-]*)|[\/,](?=\S)/g, (all, before, flag) =>
      flag ? `${before}<span class="whole">${flag}</span>` : `${all}<wbr>`)
for (const cell of document.querySelectorAll("article td"))
  if (/^[\d.\s\/–]+$/.test(cell.textContent)) cell.classList.add("figures")
for (const picture of document.querySelectorAll("article p > img"))
  picture.outerHTML = `<a href="${picture.src}">${picture.outerHTML}</a>`
