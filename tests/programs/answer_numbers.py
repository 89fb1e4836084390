"""Answers requests for some linear algebra: a line with a seed, and a line with the answer."""
import socket, sys
import numpy
from scipy import fft, integrate, interpolate, linalg, optimize, signal, sparse, stats
from scipy.sparse import linalg as sparse_linalg


def solve(random):
    a = random.standard_normal((220, 220))
    return linalg.solve(a, a[0])


def eigenvalues(random):
    a = random.standard_normal((160, 160))
    return linalg.eigvalsh(a + a.T)


def spectrum(random):
    return abs(fft.rfft(random.standard_normal(1 << 15)))[:100]


def smooth(random):
    return signal.lfilter(*signal.butter(4, 0.2), random.standard_normal(20000))[-100:]


def sparse_solve(random):
    n = 2000
    a = sparse.random(n, n, 0.001, "csc", random_state=random) + 4 * sparse.identity(n, format="csc")
    return sparse_linalg.spsolve(a, random.standard_normal(n))


def minimum(random):
    return optimize.minimize(optimize.rosen, random.standard_normal(4), method="BFGS").x


def fit(random):
    x = numpy.sort(random.uniform(0, 9, 60))
    return interpolate.CubicSpline(x, numpy.sin(x))(numpy.linspace(1, 8, 50))


def compare(random):
    return numpy.array(stats.ttest_ind(random.standard_normal(500), random.standard_normal(500)))


def area(random):
    k = random.uniform(1, 3)
    return numpy.array(integrate.quad(lambda x: numpy.exp(-k * x * x), 0, 5))


WAYS = [solve, eigenvalues, spectrum, smooth, sparse_solve, minimum, fit, compare, area]


def answer(line):
    random = numpy.random.default_rng(int(line))
    ways = random.choice(len(WAYS), 4, replace=False)
    return " ".join(repr(float(numpy.sum(WAYS[way](random)))) for way in ways)


listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
while True:
    connection, _ = listener.accept()
    with connection, connection.makefile("rw") as lines:
        for line in lines:
            lines.write(answer(line) + "\n")
            lines.flush()
