// Memory whose every word is known: heap MIB STATUS PAGES
//
// Checks so many pages at random in each turn, changes them, and writes to STATUS how many it has checked (and one), how many were wrong,
// how often it has checked all, which it does on SIGUSR1, and how often a quarter, which it does on SIGUSR2, from
// the page on that it finds there. It has no file open, so that it can be restored again and
// again.
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define WORDS 512

static volatile sig_atomic_t asked, asked_for_some;

static void ask(int signal) { asked = 1; }

static void ask_for_some(int signal) { asked_for_some = 1; }

static uint64_t mix(uint64_t x) {
	x ^= x >> 31;
	x *= 0x9E3779B97F4A7C15ull;
	return x ^ x >> 29;
}

// Words that compress about as memory does.
static uint64_t word(uint64_t page, uint64_t generation, uint64_t i) {
	return i % 4 ? (page + i) & 0xffff : mix(page * 1315423911u + generation * 2654435761u + i);
}

static void fill(uint64_t *pages, uint64_t page, uint64_t generation) {
	for (uint64_t i = 0; i < WORDS; i++) pages[page * WORDS + i] = word(page, generation, i);
}

static int is_wrong(const uint64_t *pages, uint64_t page, uint64_t generation) {
	for (uint64_t i = 0; i < WORDS; i++)
		if (pages[page * WORDS + i] != word(page, generation, i)) return 1;
	return 0;
}

int main(int argc, char **argv) {
	uint64_t count = strtoull(argv[1], 0, 10) << 8;
	int each_turn = atoi(argv[3]);
	uint64_t *pages = aligned_alloc(4096, count * 4096);
	uint8_t *generations = calloc(count, 1);
	for (uint64_t page = 0; page < count; page++) fill(pages, page, 0);
	signal(SIGUSR1, ask);
	signal(SIGUSR2, ask_for_some);
	uint64_t random = 1, checked = 0, wrong = 0, checked_all = 0;
	// A file that is mapped, and not open: one that is open for a moment could be dumped at that moment.
	int file = open(argv[2], O_CREAT | O_RDWR, 0666);
	if (ftruncate(file, 4096)) return 1;
	volatile uint64_t *status = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	close(file);
	for (;;) {
		for (int i = 0; i < each_turn; i++) {
			random = random * 6364136223846793005ull + 1442695040888963407ull;
			uint64_t page = (random >> 33) % count;
			wrong += is_wrong(pages, page, generations[page]);
			if (i % 2) fill(pages, page, ++generations[page]);
			checked++;
		}
		if (asked) {
			asked = 0;
			for (uint64_t page = 0; page < count; page++) wrong += is_wrong(pages, page, generations[page]);
			checked_all++;
		}
		if (asked_for_some) {
			asked_for_some = 0;
			// Each page once, in an order that jumps, from the page on that somebody else has written there.
			for (uint64_t i = 0, page = status[4] % count; i < count / 4; i++, page = (page + 40503) % count)
				wrong += is_wrong(pages, page, generations[page]);
			status[3]++;
		}
		status[1] = wrong;
		status[2] = checked_all;
		status[0] = checked + 1;
		usleep(2000);
	}
}
