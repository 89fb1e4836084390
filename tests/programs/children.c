// A process with memory in many extents that forks many children at once, while another process touches memory:
// children EXTENTS CHILDREN PAGES STATUS
//
// It waits until the word 4 of STATUS is set. Then the first process forks CHILDREN children, which check all extents
// between them and are alive at the same time. Meanwhile the other process touches its PAGES pages, each once.
// The words of STATUS: 0 is set when both have their memory; 1 counts errors; 2 is the time in microseconds until all
// children had ended; 3 counts the other process's touches; 5 counts the children that have checked their extents; 6 is
// set when the other process has its memory; from 8 on there are the microseconds of each touch.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define WORDS 512

static volatile uint64_t *status;

static uint64_t now_us(void) {
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000ull + now.tv_nsec / 1000;
}

static uint64_t word(uint64_t page, uint64_t i) { return (page + 1) * 0x9E3779B97F4A7C15ull + i; }

// Memory of so many pages, of which each `step`th has bytes.
static uint64_t *memory(uint64_t pages, uint64_t step) {
	uint64_t *at = mmap(0, pages * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	madvise(at, pages * 4096, MADV_NOHUGEPAGE);
	for (uint64_t page = 0; page < pages; page += step)
		for (uint64_t i = 0; i < WORDS; i++) at[page * WORDS + i] = word(page, i);
	return at;
}

static int is_wrong(const volatile uint64_t *pages, uint64_t page) {
	return pages[page * WORDS] != word(page, 0) || pages[page * WORDS + 511] != word(page, 511);
}

static void wrong(void) { __atomic_fetch_add(&status[1], 1, __ATOMIC_SEQ_CST); }

static void touch(const volatile uint64_t *pages, uint64_t count) {
	status[6] = 1;
	while (!status[4]) usleep(500);
	for (uint64_t i = 0, page = 0; i < count && !status[2]; i++, page = (page + 40503) % count) {
		uint64_t before = now_us();
		(void)pages[page * WORDS];
		status[8 + i] = now_us() - before;
		if (is_wrong(pages, page)) wrong();
		status[3] = i + 1;
		usleep(200);
	}
	for (;;) pause();
}

int main(int argc, char **argv) {
	uint64_t extents = strtoull(argv[1], 0, 10), children = strtoull(argv[2], 0, 10), pages = strtoull(argv[3], 0, 10);
	// A file that is mapped, and not open: one that is open for a moment could be dumped at that moment.
	int file = open(argv[4], O_CREAT | O_RDWR, 0666);
	size_t length = (8 + pages) * 8;
	if (ftruncate(file, length)) return 1;
	status = mmap(0, length, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	close(file);
	if (fork() == 0) touch(memory(pages, 1), pages);
	// Every second page is a hole.
	uint64_t *mine = memory(2 * extents, 2);
	while (!status[6]) usleep(500);
	while (!status[4]) {
		status[0] = 1;
		usleep(500);
	}
	uint64_t before = now_us();
	for (uint64_t child = 0; child < children; child++) {
		pid_t pid = fork();
		if (pid < 0) wrong();
		if (pid != 0) continue;
		for (uint64_t extent = child; extent < extents; extent += children)
			if (is_wrong(mine, 2 * extent) || mine[(2 * extent + 1) * WORDS]) wrong();
		__atomic_fetch_add(&status[5], 1, __ATOMIC_SEQ_CST);
		while (status[5] < children) usleep(500);
		_exit(0);
	}
	for (uint64_t child = 0; child < children; child++) {
		int result;
		if (wait(&result) < 0 || result) wrong();
	}
	status[2] = now_us() - before;
	for (;;) pause();
}
