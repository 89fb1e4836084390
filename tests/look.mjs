// Looks at each report in a folder, in Chromium without a network: wide and narrow, light and dark. What is wrong ends it.

import { readdirSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

const folder = resolve(process.argv[2]);
const { chromium } = createRequire(resolve(folder, "package.json"))("playwright-core");

const WIDTHS = [1280, 768, 360];
const quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"];
const browser = await chromium.launch({ executablePath: "/usr/bin/chromium", args: ["--no-sandbox", "--disable-gpu", ...quiet] });
const wrong = [];

// In the page: what is not as it should be.
function look() {
  const found = [];
  const root = document.documentElement;
  if (root.scrollWidth > innerWidth) found.push(`it is ${root.scrollWidth} wide, in ${innerWidth}`);
  const sections = document.querySelectorAll("section").length;
  if (sections !== 5) found.push(`${sections} sections of 5`);
  for (const svg of document.querySelectorAll("svg")) {
    const { width, height } = svg.getBoundingClientRect();
    if (width < 200 || height < 5) found.push(`a drawing of ${width} x ${height}`);
    for (const text of svg.querySelectorAll("text")) {
      const [inner, outer] = [text.getBoundingClientRect(), svg.getBoundingClientRect()];
      const isOut = inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1;
      if (isOut) found.push(`${JSON.stringify(text.textContent)} is cut off`);
    }
    if (svg.parentElement.tagName === "SECTION" && !svg.getAttribute("aria-label")) found.push("a drawing without a name");
  }
  if (/NaN|undefined|Infinity/.test(document.body.innerText)) found.push("a number that is none");
  if (document.querySelector("b, script, link, img, iframe")) found.push("an element that does not belong there");
  return found;
}

const reports = readdirSync(folder).filter((name) => name.endsWith(".html"));
for (const name of reports) {
  for (const width of WIDTHS) {
    for (const colorScheme of ["light", "dark"]) {
      const context = await browser.newContext({ viewport: { width, height: 900 }, colorScheme, offline: true });
      const page = await context.newPage();
      const where = `${name}, ${width} wide, ${colorScheme}`;
      const say = (what) => wrong.push(`${where}: ${what}`);
      page.on("console", (message) => say(`the console says ${message.text()}`));
      page.on("pageerror", (error) => say(error.message));
      page.on("request", (request) => request.url().startsWith("file:") || say(`it asks for ${request.url()}`));
      await page.goto(pathToFileURL(resolve(folder, name)).href);
      (await page.evaluate(look)).forEach(say);
      await page.screenshot({ path: resolve(folder, name.replace(".html", `-${width}-${colorScheme}.png`)), fullPage: true });
      await context.close();
    }
  }
}
await browser.close();
wrong.forEach((what) => console.error(what));
console.log(`${reports.length} reports, ${WIDTHS.length} widths, light and dark: ${wrong.length} wrong`);
process.exitCode = wrong.length || reports.length === 0 ? 1 : 0;
