"""MovieLens against a recomputation in plain Python from the raw lines, and against its own future.

The fixture is a small made-up data set in GroupLens' format in which, as in the real one, users rate several films in
the same second. The last test downloads the real files; it needs the network.
"""

import bisect
import dataclasses
import functools
import itertools
import math
import subprocess
import time
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from kunlun_jax.batch import check_batch
from kunlun_jax.data import movielens
from kunlun_jax.jagged import span_index
from kunlun_jax.schema import PADDING_ID

USERS, FILMS, RATINGS = 30, 60, 1_500
JOBS = ("artist", "lawyer", "none")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_grouplens(tmp_path_factory.mktemp("grouplens"))


@pytest.fixture(scope="module")
def parts(directory):
    return movielens.load(directory, max_length=12)


def write_grouplens(path, seed=0):
    """Ids have gaps, lines no order; the data set's quirks are in: no year, no genre, letters in zip codes, accents."""
    rng = np.random.default_rng(seed)
    users, films = rng.permutation(100)[:USERS] + 1, rng.permutation(300)[:FILMS] + 1
    clock, lines = 880_000_000, []
    pairs = rng.permutation([(u, f) for u in users for f in films])[:RATINGS]
    sessions = [sorted(pairs[i : i + 150].tolist()) for i in range(0, RATINGS, 150)]
    for user, film in (pair for session in sessions for pair in session):
        clock += int(rng.choice([0, 0, 0, 1, 40, 5_000]))
        lines.append(f"{user}\t{film}\t{rng.integers(1, 6)}\t{clock}")
    rng.shuffle(lines)
    (path / "u.data").write_text("\n".join(lines) + "\n")
    flags = (rng.random((FILMS, 19)) < 0.15).astype(int)
    flags[3] = 0
    titles = [f"Müller {i} ({1930 + i})" if i % 9 else "Unknown" for i in range(FILMS)]
    text = [f"{f}|{t}|01-Jan-1999||url|{'|'.join(map(str, g))}" for f, t, g in zip(films, titles, flags, strict=True)]
    (path / "u.item").write_bytes("\n".join(text).encode("latin-1") + b"\n")
    codes = ["94110", "V3N4P", "00000", "", "1234"]
    people = [f"{u}|{7 + i}|{'MF'[i % 2]}|{JOBS[i % 3]}|{codes[i % 5]}" for i, u in enumerate(users)]
    (path / "u.user").write_text("\n".join(people) + "\n")
    return path


def write_recbole(source, path):
    """The same data in RecBole's format."""
    lines = (source / "u.data").read_text().splitlines()
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    (path / "ml-100k.inter").write_text("\n".join([header, *lines]) + "\n")
    rows = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    for line in (source / "u.item").read_text("latin-1").splitlines():
        film, title, *rest = line.split("|")
        name, _, year = title.partition(" (")
        genres = [genre for genre, flag in zip(movielens.GENRES, rest[3:], strict=True) if flag == "1"]
        rows.append(f"{film}\t{name}\t{year.rstrip(')') or 'unkonwn'}\t{' '.join(genres)}")
    (path / "ml-100k.item").write_text("\n".join(rows) + "\n", "utf-8")
    people = (source / "u.user").read_text().replace("|", "\t")
    header = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"
    (path / "ml-100k.user").write_text(f"{header}\n{people}")
    return path


class Naive:
    """Everything about one rating, from lists of raw tuples (time, user id, film id, stars) and plain loops."""

    def __init__(self, ratings, users, films):
        self.rows = sorted(ratings)
        self.stars_before = [0, *itertools.accumulate(row[3] for row in self.rows)]
        self.users, self.films = users, films
        self.user_rows = {u: i for i, u in enumerate(sorted(users))}
        self.film_rows = {f: i for i, f in enumerate(sorted(films))}
        self.jobs = sorted({user[2] for user in users.values()})
        self.of_user, self.of_film = defaultdict(list), defaultdict(list)
        self.mean_stars, self.expectation = functools.cache(self.mean_stars), functools.cache(self.expectation)
        for row in self.rows:
            self.of_user[row[1]].append(row)
            self.of_film[row[2]].append(row)

    @classmethod
    def of_grouplens(cls, path):
        ratings = [tuple(map(int, line.split("\t"))) for line in (path / "u.data").read_text().splitlines()]
        films = {}
        for line in (path / "u.item").read_text("latin-1").splitlines():
            key, title, _, _, _, *flags = line.split("|")
            films[int(key)] = (
                int(title[-5:-1]) if title.endswith(")") else 0,
                [i for i, f in enumerate(flags) if f == "1"],
            )
        return cls([(t, u, f, s) for u, f, s, t in ratings], cls.people(path / "u.user", "|"), films)

    @classmethod
    def of_recbole(cls, path):
        lines = (path / "ml-100k.inter").read_text().splitlines()[1:]
        ratings = [tuple(int(float(x)) for x in line.split("\t")) for line in lines]
        films = {}
        for line in (path / "ml-100k.item").read_text("utf-8").splitlines()[1:]:
            key, _, year, names = line.split("\t")
            genres = sorted(movielens.GENRES.index(name) for name in names.split())
            films[int(key)] = (int(year) if year.isdecimal() else 0, genres)
        return cls([(t, u, f, s) for u, f, s, t in ratings], cls.people(path / "ml-100k.user", "\t"), films)

    @staticmethod
    def people(path, separator):
        fields = [line.split(separator) for line in path.read_text().splitlines() if line[0].isdecimal()]
        return {int(u): (int(age), gender, job, code) for u, age, gender, job, code in fields}

    def mean_stars(self, key, now):
        """Smoothed mean stars before `now`, of everything or of one ("user" or "film", id)."""
        if key is None:
            ever = bisect.bisect_left(self.rows, (now,))
            return (7 + self.stars_before[ever]) / (2 + ever)
        rows = {"user": self.of_user, "film": self.of_film}[key[0]][key[1]]
        past = [row[3] for row in rows if row[0] < now]
        return (5 * self.mean_stars(None, now) + sum(past)) / (5 + len(past))

    def expectation(self, now, user, film):
        """The global mean, the user's residual and the film's residual before `now`; their sum is expected."""
        of_user = [s - self.mean_stars(("film", f), t) for t, _, f, s in self.of_user[user] if t < now]
        of_film = [s - self.mean_stars(("user", u), t) for t, u, _, s in self.of_film[film] if t < now]
        return self.mean_stars(None, now), sum(of_user) / (5 + len(of_user)), sum(of_film) / (5 + len(of_film))

    def surprise(self, row):
        return row[3] - sum(self.expectation(*row[:3]))

    def sample(self, index, max_length):
        now, user, film, stars = self.rows[index]
        year, genres = self.films[film]
        age, gender, job, code = self.users[user]
        date = time.gmtime(now)
        sparse = {
            "user": [self.user_rows[user]], "age": [age // 5], "gender": ["FM".index(gender)],
            "occupation": [self.jobs.index(job)], "zip": [int(code[0]) if code[:1].isdecimal() else 10],
            "hour": [date.tm_hour], "weekday": [date.tm_wday], "film": [self.film_rows[film]],
            "year": [year - 1899 if year else 0], "genres": genres,
        }  # fmt: skip

        past = [row for row in self.of_user[user] if row[0] < now]
        ever = [row[3] for row in self.rows if row[0] < now]
        like, star = (1 + sum(s >= 4 for s in ever)) / (2 + len(ever)), (7 + sum(ever)) / (2 + len(ever))

        def smoothed(rows):
            return (5 * like + sum(r[3] >= 4 for r in rows)) / (5 + len(rows))

        def mean_stars(rows):
            return (5 * star + sum(r[3] for r in rows)) / (5 + len(rows))

        others = [row for row in self.of_film[film] if row[0] < now]
        shared = [row for row in past for genre in self.films[row[2]][1] if genre in genres]
        dense = {
            "user_count": math.log(1 + len(past)), "user_mean": smoothed(past), "user_stars": mean_stars(past),
            "user_gap": math.log(1 + now - max(row[0] for row in past)) if past else 0.0,
            "film_count": math.log(1 + len(others)), "film_mean": smoothed(others), "film_stars": mean_stars(others),
            "user_genre_count": math.log(1 + len(shared)), "user_genre_mean": smoothed(shared),
            "user_residual": self.expectation(now, user, film)[1],
            "film_residual": self.expectation(now, user, film)[2],
            "expected_stars": sum(self.expectation(now, user, film)),
            "user_recent": sum(map(self.surprise, past[-10:])) / (1 + len(past[-10:])),
            "user_genre_surprise": sum(map(self.surprise, shared)) / (5 + len(shared)),
        }  # fmt: skip
        dense = {k: (v - movielens.SCALES[k][0]) / movielens.SCALES[k][1] for k, v in dense.items()}

        events = {}
        for name, chosen in (("liked", True), ("disliked", False)):
            kept = [row for row in past if (row[3] >= 4) == chosen][-max_length:]
            events[name] = {
                "film": [[self.film_rows[row[2]]] for row in kept],
                "genres": [self.films[row[2]][1] for row in kept],
                "rating": [[row[3] - 1] for row in kept],
                "surprise": [pytest.approx(self.surprise(row), abs=1e-5) for row in kept],
                "gap": [float(b[0] - a[0]) for a, b in zip([*kept[:1], *kept], kept, strict=False)],
                "age": [float(now - row[0]) for row in kept],
            }
        return sparse, dense, events, float(stars >= 4)


def locate(parts, index):
    """The part, and the place in it, of a rating by its place among all."""
    for name, samples in parts.items():
        if index < len(samples):
            return name, index
        index -= len(samples)
    raise IndexError(index)


def compare(naive, parts, indices, max_length):
    for index in indices:
        part, place = locate(parts, index)
        batch = check_batch(parts[part].batch(np.array([place])), parts[part].schema)
        sparse, dense, events, label = naive.sample(index, max_length)
        assert batch.labels[0, 0] == label
        assert batch.sparse.keys() == sparse.keys()
        assert batch.dense.keys() == dense.keys()
        for name, ids in sparse.items():
            assert [i for i in batch.sparse[name][0] if i != PADDING_ID] == ids, (index, name)
        for name, value in dense.items():
            assert batch.dense[name][0] == pytest.approx(value, abs=1e-5), (index, name)
        for name, fields in events.items():
            sequence = batch.events[name]
            length = sequence.lengths[0, 0]
            assert length == len(fields["age"]), (index, name)
            for field, tokens in fields.items():
                got = sequence.values[field][0, :length].tolist()
                if isinstance(got and got[0], list):
                    got = [[i for i in ids if i != PADDING_ID] for ids in got]
                assert got == tokens, (index, name, field)


def test_samples_equal_a_recomputation_in_plain_python(directory, parts):
    rows = Naive.of_grouplens(directory)
    assert {name: len(part) for name, part in parts.items()} == {"train": 1200, "validation": 150, "test": 150}
    compare(rows, parts, np.random.default_rng(0).permutation(RATINGS)[:300].tolist(), max_length=12)


def test_the_fixture_has_shared_seconds_and_cut_histories(directory, parts):
    """Otherwise the test above would not see a leak or a wrong cut."""
    raw = movielens.read(directory)
    order = np.lexsort((raw.time, raw.user))
    same = (np.diff(raw.time[order]) == 0) & (np.diff(raw.user[order]) == 0)
    assert same.mean() > 0.1
    for events in parts["train"].events.values():
        assert set(np.unique(events.stop - events.start)) == set(range(13))


@pytest.mark.parametrize("seed", range(3))
def test_nothing_depends_on_the_samples_own_second_or_later(directory, parts, seed):
    """Give every rating of that second and after it other stars, and all but the sample another user, film and time."""
    raw, rng = movielens.read(directory), np.random.default_rng(seed)
    for index in rng.permutation(RATINGS)[:12]:
        now = raw.time[index]
        late = raw.time >= now
        other = late & (np.arange(RATINGS) != index)
        altered = {
            "user": np.where(other, rng.integers(0, USERS, RATINGS), raw.user),
            "film": np.where(other, rng.integers(0, FILMS, RATINGS), raw.film),
            "stars": np.where(late, 6 - raw.stars, raw.stars),
            "time": np.where(other, now + rng.choice([0, 1, 10_000], RATINGS), raw.time),
        }
        order = np.lexsort((altered["film"], altered["user"], altered["time"]))
        future = dataclasses.replace(raw, **{name: column[order] for name, column in altered.items()})
        changed = movielens.prepare(future, max_length=12)

        def sample(parts, place):
            part, place = locate(parts, place)
            batch = parts[part].batch(np.array([place]))
            return batch.sparse, batch.dense, {k: (s.values, s.lengths) for k, s in batch.events.items()}

        before, after = sample(parts, index), sample(changed, int(np.argmax(order == index)))
        np.testing.assert_equal(after, before)


def test_both_formats_read_alike(directory, tmp_path):
    mine, theirs = movielens.read(directory), movielens.read(write_recbole(directory, tmp_path))
    for field in dataclasses.fields(mine):
        np.testing.assert_array_equal(getattr(mine, field.name), getattr(theirs, field.name), err_msg=field.name)
    assert (mine.year == 0).any()
    assert not mine.genres.any(axis=1).all()


def test_schema(directory):
    schema = movielens.load(directory, width=4, max_length=7)["train"].schema
    assert {table.width for table in schema.tables} == {4}
    assert [(event.name, event.max_length) for event in schema.events] == [("liked", 7), ("disliked", 7)]
    assert schema.group == "user"
    scopes = {f.name: f.scope for f in schema.dense + schema.sparse}
    candidate = {name for name, scope in scopes.items() if scope == "candidate"}
    assert candidate == {
        "film", "year", "genres", "film_count", "film_mean", "film_stars", "user_genre_count", "user_genre_mean",
        "film_residual", "expected_stars", "user_genre_surprise",
    }  # fmt: skip
    raw = movielens.read(directory)
    genres = next(f for f in schema.sparse if f.name == "genres")
    assert genres.max_ids == raw.genres.sum(axis=1).max()


def replace_line(name, number, text):
    def change(path):
        lines = (path / name).read_text("latin-1").splitlines()
        lines[number - 1] = text
        (path / name).write_text("\n".join(lines) + "\n", "latin-1")

    return change


FLAGS = "|".join("0" * 19)
BAD_GROUPLENS = {
    "not a number": (replace_line("u.data", 3, "1\t2\tx\t4"), r"u\.data: .*'x'"),
    "missing column": (lambda p: (p / "u.data").write_text("1\t2\t3\n"), r"u\.data: expected lines of user, film"),
    "half stars": (replace_line("u.data", 3, "1\t2\t3.5\t4"), r"u\.data, line 3: .*3\.5.* not all whole numbers"),
    "rating": (replace_line("u.data", 3, "1\t2\t6\t4"), r"u\.data, line 3: rating 6 is outside 1 to 5"),
    "user": (replace_line("u.data", 3, "999\t2\t3\t4"), r"u\.data, rating 3: user 999 is not in .*u\.user"),
    "film": (
        replace_line("u.item", 2, f"999|A (1990)|||u|{FLAGS}"),
        r"u\.data, rating \d+: film \d+ is not in .*u\.item",
    ),
    "fields": (replace_line("u.item", 2, "1|A"), r"u\.item, line 2: 2 fields divided by '\|', expected 24"),
    "flag": (replace_line("u.item", 2, f"999|A (1990)|||u|{FLAGS[:-1]}7"), r"u\.item, line 2: genre flags"),
    "id": (replace_line("u.user", 2, "x|20|M|none|1"), r"u\.user, line 2: .*'x'"),
    "same id": (
        lambda p: (p / "u.user").write_text("1|20|M|none|1\n1|20|M|none|1\n"),
        r"u\.user, line 2: id 1 occurs twice",
    ),
    "age": (replace_line("u.user", 2, "999|120|M|none|1"), r"u\.user, line 2: age 120 is outside \[0, 100\)"),
    "gender": (replace_line("u.user", 2, "999|20|X|none|1"), r"u\.user, line 2: gender 'X'"),
    "empty": (lambda p: (p / "u.user").write_text(""), r"u\.user: no entries"),
}


@pytest.mark.parametrize("case", BAD_GROUPLENS)
def test_bad_files_are_refused_with_file_and_line(tmp_path, case):
    change, message = BAD_GROUPLENS[case]
    change(write_grouplens(tmp_path))
    with pytest.raises(ValueError, match=message):
        movielens.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "line", "text", "message"),
    [
        ("ml-100k.inter", 1, "user_id:token\trating:float", "columns are .* expected"),
        ("ml-100k.item", 1, "item_id:token\tclass:token_seq", "columns are .* expected"),
        ("ml-100k.user", 1, "age:token\tuser_id:token", "columns are .* expected"),
        ("ml-100k.item", 2, "999\tA\t1990\tTragedy", r"line 2: unknown genres \['Tragedy'\]"),
    ],
)
def test_bad_recbole_files_are_refused(directory, tmp_path, name, line, text, message):
    write_recbole(directory, tmp_path)
    replace_line(name, line, text)(tmp_path)
    with pytest.raises(ValueError, match=rf"{name}, .*{message}"):
        movielens.load(tmp_path)


def test_a_directory_without_the_files_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds neither u\.data, .* nor ml-100k\.inter"):
        movielens.load(tmp_path)


# --- fetching ------------------------------------------------------------------------------------------------------


def fake_pip(monkeypatch, download):
    """Put `download(folder) -> (status, stderr)` in place of pip; returns the list of commands that were run."""
    commands = []

    def run(command, **_):
        commands.append(command)
        status, stderr = download(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, status, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def wheel_with(files):
    def download(folder):
        with zipfile.ZipFile(folder / "recbole-1.2.1-py3-none-any.whl", "w") as wheel:
            for file in files:
                wheel.write(file, f"recbole/dataset_example/ml-100k/{file.name}")
        return 0, ""

    return download


def test_fetch_unpacks_the_wheel_once(directory, tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    source = write_recbole(directory, tmp_path / "source")
    commands = fake_pip(monkeypatch, wheel_with(list(source.iterdir())))
    target = tmp_path / "new" / "data"
    for _ in range(2):
        assert movielens.fetch(target) == target
    assert len(commands) == 1
    assert commands[0][1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "recbole==1.2.1"} <= set(commands[0])
    assert sorted(f.name for f in target.iterdir()) == sorted(movielens.RECBOLE_FILES)
    movielens.load(target)
    # A run killed between two of the files leaves an incomplete set, which is fetched anew.
    (target / "ml-100k.user").unlink()
    movielens.fetch(target)
    assert len(commands) == 2
    movielens.load(target)


def test_fetch_takes_the_users_files(directory, monkeypatch):
    commands = fake_pip(monkeypatch, lambda folder: (1, "must not be called"))
    assert movielens.fetch(directory) == directory
    assert not commands


@pytest.mark.parametrize(
    ("download", "message"),
    [
        (lambda folder: (1, "noise\nERROR: no route to host\n"), r"through pip: ERROR: no route to host\); connect"),
        (lambda folder: (1, ""), r"through pip: status 1\)"),
        (lambda folder: (0, ""), "not what was expected: StopIteration"),
        (wheel_with([]), "not what was expected: KeyError"),
        (lambda folder: ((folder / "recbole.whl").write_text("half"), (0, ""))[1], "not what was expected: BadZipFile"),
    ],
)
def test_a_failed_download_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, download, message):
    fake_pip(monkeypatch, download)
    with pytest.raises(RuntimeError, match=message) as caught:
        movielens.fetch(tmp_path)
    assert "\n" not in str(caught.value)
    assert "directory that holds GroupLens' u.data, u.item, u.user" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_incomplete_directory_of_the_users_is_refused(tmp_path, monkeypatch):
    fake_pip(monkeypatch, lambda folder: (1, "must not be called"))
    (tmp_path / "u.data").write_text("")
    with pytest.raises(FileNotFoundError, match=r"holds u\.data, but not u\.item, u\.user"):
        movielens.fetch(tmp_path)


@pytest.mark.slow
def test_the_real_data(tmp_path):
    """Downloads 2 MB. The facts that the task's definition states, and 200 samples recomputed."""
    path = movielens.fetch(tmp_path)
    begin = time.perf_counter()
    parts = movielens.load(path)
    assert time.perf_counter() - begin < 20  # 0.2 s measured
    assert {name: len(part) for name, part in parts.items()} == {"train": 80_000, "validation": 10_000, "test": 10_000}
    labels = np.concatenate([part.labels for part in parts.values()])
    assert labels.mean() == pytest.approx(0.554, abs=5e-4)

    raw = movielens.read(path)
    assert (len(raw.age), len(raw.year)) == (943, 1_682)
    order = np.lexsort((raw.time, raw.user))
    same = (np.diff(raw.time[order]) == 0) & (np.diff(raw.user[order]) == 0)
    assert same.mean() == pytest.approx(0.5, abs=0.01)
    # Of the test part's samples, not of its distinct users.
    assert np.isin(raw.user[90_000:], raw.user[:80_000], invert=True).mean() == pytest.approx(0.86, abs=0.005)

    base = parts["train"].base_rates()[movielens.TASK]
    assert base == pytest.approx(0.5509, abs=5e-5)
    rate = parts["test"].labels.mean()
    entropy = -base * np.log(base) - (1 - base) * np.log(1 - base)
    loss = -rate * np.log(base) - (1 - rate) * np.log(1 - base)
    assert loss / entropy == pytest.approx(0.9964, abs=5e-5)

    for name, column in parts["train"].dense.items():
        assert abs(column.mean()) < 0.1, name
        assert 0.85 < column.std() < 1.15, name
    for events in parts["train"].events.values():
        kept = span_index(events.start, events.stop - events.start)
        assert (events.stop - events.start).max() == 200
        assert len(kept) > 3_000_000
    compare(Naive.of_recbole(path), parts, np.random.default_rng(0).permutation(100_000)[:200].tolist(), 200)
