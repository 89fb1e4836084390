"""Answers questions to an SQLite database in memory: a line with a seed, and a line with the answer."""
import random, socket, sqlite3, sys

ROWS = 600_000
WORDS = "amber birch copper delta ember fjord garnet harbor indigo juniper kelp lagoon".split()
database = sqlite3.connect(":memory:")
database.execute("create table orders (id integer primary key, customer integer, item text, session text, cents integer)")


def rows():
    choose = random.Random(7)
    for row in range(ROWS):
        session = "%032x%032x" % (choose.getrandbits(128), choose.getrandbits(128))
        items = " ".join(choose.choices(WORDS, k=12))
        yield row, choose.randrange(20_000), items, session, choose.randrange(99_999)


database.executemany("insert into orders values (?, ?, ?, ?, ?)", rows())
database.execute("create index by_customer on orders (customer)")


def answer(line):
    choose = random.Random(int(line))
    one = "select cents, session from orders where id = ?"
    found = [database.execute(one, [choose.randrange(ROWS)]).fetchone() for _ in range(50)]
    many = "select count(*), sum(cents), max(item) from orders where customer = ?"
    sums = [database.execute(many, [choose.randrange(20_000)]).fetchone() for _ in range(10)]
    return repr((found, sums))


listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
while True:
    connection, _ = listener.accept()
    with connection, connection.makefile("rw") as lines:
        for line in lines:
            lines.write(answer(line) + "\n")
            lines.flush()
