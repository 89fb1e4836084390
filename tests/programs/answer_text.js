// Answers searches in an index of texts: a line with a seed, and a line with the answer.
const net = require("net");
const crypto = require("crypto");

function seeded(seed) {
	let state = seed >>> 0;
	return (below) => {
		state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
		return Math.floor((state / 4294967296) * below);
	};
}

const TEXTS = 120000;
const choose = seeded(7);
const texts = [];
const index = new Map();
for (let id = 0; id < TEXTS; id++) {
	const words = [];
	for (let n = 0; n < 12; n++) words.push("w" + Math.floor(Math.sqrt(choose(1e8))));
	texts.push({ id, words, title: words.slice(0, 3).join(" ") });
	for (const word of words) {
		if (!index.has(word)) index.set(word, []);
		index.get(word).push(id);
	}
}

function answer(line) {
	const pick = seeded(Number(line) * 7919);
	const digest = crypto.createHash("sha256");
	for (let n = 0; n < 200; n++) {
		const found = index.get("w" + pick(10000)) || [];
		for (const id of found.slice(0, 5)) digest.update(JSON.stringify(texts[id]));
	}
	return digest.digest("hex");
}

net.createServer((connection) => {
	let rest = "";
	connection.on("data", (data) => {
		rest += data;
		for (let end = rest.indexOf("\n"); end >= 0; end = rest.indexOf("\n")) {
			connection.write(answer(rest.slice(0, end)) + "\n");
			rest = rest.slice(end + 1);
		}
	});
	connection.on("error", () => {});
}).listen(process.argv[2]);
