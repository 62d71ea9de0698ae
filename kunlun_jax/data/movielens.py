"""MovieLens-100K as a click task: will this user like this film (rate it 4 or 5)?

One sample per rating, in order of (time, user, film); the first 80 % train, the next 10 % validate, the last 10 % test.
Whatever a sample uses happened in a strictly earlier second. Order alone would not do: users rate lists of films, and
half of the ratings share their second with another one of the same user, so counts up to the previous row would give
labels away.

Choices of ours: ages in 5-year steps; zip codes by their first character, the US region, all others in one row; past
means smoothed as if 5 earlier ratings had come out at the past global mean; residuals beside the means, and each
event's surprise (`past_statistics`); dense columns centred and scaled by
constants that were measured once on the training part and are written down here, so that no sample depends on later
ones even in its units.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from kunlun_jax.data.samples import Events, Samples
from kunlun_jax.schema import HOST_PADDING_ID, DenseField, EventType, FeatureSchema, SparseField, Table

TASK = "like"
RECBOLE_WHEEL = "recbole==1.2.1"
RECBOLE_FILES = ("ml-100k.inter", "ml-100k.item", "ml-100k.user")
GROUPLENS_FILES = ("u.data", "u.item", "u.user")
# In the order of the flags of u.item.
GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
GENDERS = ("F", "M")
FIRST_YEAR, LAST_YEAR = 1900, 1999
LIKED = 4  # stars
SMOOTHING = 5.0  # ratings
RECENT = 10  # ratings
AGE_STEP, AGE_LIMIT = 5, 100  # years
ZIP_REGIONS = 10
DAY, HOUR = 86_400, 3_600

# (centre, scale) of each dense column, rounded from its mean and deviation over the training part.
SCALES = {
    "user_count": (4.0, 1.3),
    "user_mean": (0.58, 0.16),
    "user_stars": (3.6, 0.4),
    "user_gap": (3.8, 1.9),
    "film_count": (3.6, 1.3),
    "film_mean": (0.58, 0.17),
    "film_stars": (3.6, 0.4),
    "user_genre_count": (3.2, 1.3),
    "user_genre_mean": (0.58, 0.16),
    "user_residual": (-0.05, 0.38),
    "film_residual": (-0.02, 0.38),
    "expected_stars": (3.5, 0.54),
    "user_recent": (0.02, 0.38),
    "user_genre_surprise": (0.03, 0.22),
}


@dataclass(frozen=True, eq=False)
class Ratings:
    """The raw data, ratings ordered by (time, user, film). Users and films are row numbers, in order of their ids.

    Attributes:
      user, film, stars, time: int64 [ratings]; stars 1 to 5, time in seconds.
      age, gender, occupation, region: int64 [users]; gender and occupation as row numbers, region the zip code's first
        digit, ZIP_REGIONS where it has none.
      year: int64 [films], 0 where unknown.
      genres: bool [films, GENRES].
      occupations: how many there are.
    """

    user: Int[np.ndarray, "ratings"]
    film: Int[np.ndarray, "ratings"]
    stars: Int[np.ndarray, "ratings"]
    time: Int[np.ndarray, "ratings"]
    age: Int[np.ndarray, "users"]
    gender: Int[np.ndarray, "users"]
    occupation: Int[np.ndarray, "users"]
    region: Int[np.ndarray, "users"]
    year: Int[np.ndarray, "films"]
    genres: Bool[np.ndarray, "films genres"]
    occupations: int


def fetch(directory: str | Path) -> Path:
    """Make sure that `directory` holds MovieLens-100K; return it.

    Files that are there already, in GroupLens' or in RecBole's format, are taken as they are. Otherwise pip downloads
    the RecBole 1.2.1 wheel, which contains the data set; each file appears in the directory at once and complete.

    Raises:
      FileNotFoundError: some of GroupLens' files are there, others not.
      RuntimeError: the download failed; the message says what to do instead.
    """
    directory = Path(directory)
    if _complete(directory, GROUPLENS_FILES) or _complete(directory, RECBOLE_FILES):
        return directory
    if present := [name for name in GROUPLENS_FILES if (directory / name).exists()]:
        missing = sorted(set(GROUPLENS_FILES) - set(present))
        raise FileNotFoundError(f"{directory} holds {', '.join(present)}, but not {', '.join(missing)}; add the rest")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=directory) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--retries", "2", "--timeout", "20", "--dest", scratch, RECBOLE_WHEEL]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise _download_failed((result.stderr.strip().splitlines() or [f"status {result.returncode}"])[-1])
        try:
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
                for name in RECBOLE_FILES:
                    (Path(scratch) / name).write_bytes(wheel.read(f"recbole/dataset_example/ml-100k/{name}"))
        except (StopIteration, KeyError, zipfile.BadZipFile) as error:
            raise _download_failed(f"the wheel is not what was expected: {error!r}") from None
        for name in RECBOLE_FILES:
            (Path(scratch) / name).replace(directory / name)
    return directory


def _complete(directory: Path, names: tuple[str, ...]) -> bool:
    return all((directory / name).is_file() for name in names)


def _download_failed(reason: str) -> RuntimeError:
    return RuntimeError(
        f"MovieLens-100K could not be downloaded ({RECBOLE_WHEEL} through pip: {reason}); connect to the network, or "
        f"name a directory that holds GroupLens' {', '.join(GROUPLENS_FILES)}"
    )


def load(directory: str | Path, *, width: int = 16, max_length: int = 200) -> dict[str, Samples]:
    """The samples of the parts "train", "validation" and "test".

    Args:
      directory: holds the files, in RecBole's format or in GroupLens' own.
      width: of every embedding table.
      max_length: of both event types; the latest events are kept.

    Raises:
      FileNotFoundError: the directory holds neither format.
      ValueError: a file cannot be read as what it should be; names file and line.
    """
    return prepare(read(directory), width=width, max_length=max_length)


def prepare(ratings: Ratings, *, width: int = 16, max_length: int = 200) -> dict[str, Samples]:
    """`load` for data that has been read."""
    schema = make_schema(ratings, width=width, max_length=max_length)
    genre_ids = _multi_hot(ratings.genres)
    user, film, time = ratings.user, ratings.film, ratings.time
    sparse = {
        "user": user,
        "age": ratings.age[user] // AGE_STEP,
        "gender": ratings.gender[user],
        "occupation": ratings.occupation[user],
        "zip": ratings.region[user],
        "hour": time // HOUR % 24,
        "weekday": (time // DAY + 3) % 7,  # 0 is Monday; the epoch began on a Thursday
        "film": film,
        "year": _year_ids(ratings.year)[film],
        "genres": genre_ids[film],
    }
    statistics, surprise = past_statistics(ratings)
    dense = {name: (column - SCALES[name][0]) / SCALES[name][1] for name, column in statistics.items()}
    liked = ratings.stars >= LIKED
    histories = {
        name: _history(ratings, chosen, genre_ids, surprise)
        for name, chosen in (("liked", liked), ("disliked", ~liked))
    }

    n = len(time)
    ends = {"train": (0, n * 8 // 10), "validation": (n * 8 // 10, n * 9 // 10), "test": (n * 9 // 10, n)}
    parts = {}
    for part, (first, last) in ends.items():
        rows = slice(first, last)
        parts[part] = Samples.bind(
            schema,
            dense={name: column[rows] for name, column in dense.items()},
            sparse={name: column[rows] for name, column in sparse.items()},
            events={
                name: Events(events.columns, events.time, events.start[rows], events.stop[rows])
                for name, events in histories.items()
            },
            request_time=time[rows],
            labels=liked[rows],
        )
    return parts


def make_schema(ratings: Ratings, *, width: int, max_length: int) -> FeatureSchema:
    """The user's fields and histories belong to the request, the film's and the user-genre's to the candidate."""
    rows = {
        "user": len(ratings.age), "age": AGE_LIMIT // AGE_STEP, "gender": len(GENDERS),
        "occupation": ratings.occupations, "zip": ZIP_REGIONS + 1, "hour": 24, "weekday": 7,
        "film": len(ratings.year), "year": LAST_YEAR - FIRST_YEAR + 2, "genre": len(GENRES), "rating": 5,
    }  # fmt: skip
    max_genres = int(ratings.genres.sum(axis=1).max())
    event_fields = (
        SparseField("film", "film"),
        SparseField("genres", "genre", max_ids=max_genres),
        SparseField("rating", "rating"),
    )
    return FeatureSchema(
        tables=tuple(Table(name, count, width) for name, count in rows.items()),
        dense=tuple(DenseField(name, scope="request" if name in _REQUEST_DENSE else "candidate") for name in SCALES),
        sparse=(
            *(SparseField(f, f) for f in ("user", "age", "gender", "occupation", "zip", "hour", "weekday")),
            SparseField("film", "film", scope="candidate"),
            SparseField("year", "year", scope="candidate"),
            SparseField("genres", "genre", scope="candidate", max_ids=max_genres),
        ),
        events=tuple(
            EventType(name, max_length, sparse=event_fields, dense=(DenseField("surprise"),))
            for name in ("liked", "disliked")
        ),
        tasks=(TASK,),
        group="user",
    )


_REQUEST_DENSE = ("user_count", "user_mean", "user_stars", "user_gap", "user_residual", "user_recent")


def past_statistics(
    ratings: Ratings,
) -> tuple[dict[str, Float[np.ndarray, "ratings"]], Float[np.ndarray, "ratings"]]:
    """What each rating's second knows of the past, by column, and each rating's surprise.

    Counts are log(1 + n), shares of likes and mean stars are smoothed. `user_gap` is log(1 + seconds since the user's
    previous rating), 0 before the first. The user-genre statistics pool the user's earlier ratings over the genres of
    the film at hand, so a film with two of them counts twice.

    Users differ in what they watch, films in who watches them. So a user's residual is the mean of the earlier stars
    less the film's mean as it was then, a film's residual that of the stars less the rater's mean as it was then, both
    smoothed towards 0. The expected stars are the past global mean plus both residuals, and a rating's surprise is its
    stars less what was expected in its second: an event carries it, and `user_recent` is its mean, smoothed by one
    rating, over the user's latest RECENT ratings.
    """
    user, film, time = ratings.user, ratings.film, ratings.time
    stars = ratings.stars.astype(np.float64)
    values = np.stack([np.ones_like(stars), stars >= LIKED, stars], axis=1)
    everything = _past_sums(np.zeros_like(user), time, values)
    # Before the first second ever there is no global mean to smooth towards: one like, one dislike of 3.5 stars.
    prior = (everything + np.array([2.0, 1.0, 7.0])) / (everything[:, :1] + 2.0)

    def smoothed(sums, which):
        return (sums[:, which] + SMOOTHING * prior[:, which]) / (sums[:, 0] + SMOOTHING)

    of_user, of_film = _past_sums(user, time, values), _past_sums(film, time, values)
    user_stars, film_stars = smoothed(of_user, 2), smoothed(of_film, 2)
    user_residual = _past_sums(user, time, _exact(stars - film_stars)[:, None])[:, 0] / (of_user[:, 0] + SMOOTHING)
    film_residual = _past_sums(film, time, _exact(stars - user_stars)[:, None])[:, 0] / (of_film[:, 0] + SMOOTHING)
    expected = prior[:, 2] + user_residual + film_residual
    surprise = _exact(stars - expected)

    rating, genre = np.nonzero(ratings.genres[film])
    values = np.concatenate([values, surprise[:, None]], axis=1)
    by_genre = _past_sums(user[rating] * len(GENRES) + genre, time[rating], values[rating])
    by_genre = np.stack([np.bincount(rating, column, minlength=len(user)) for column in by_genre.T], axis=1)

    return {
        "user_count": np.log1p(of_user[:, 0]),
        "user_mean": smoothed(of_user, 1),
        "user_stars": user_stars,
        "user_gap": _log_gap(user, time),
        "film_count": np.log1p(of_film[:, 0]),
        "film_mean": smoothed(of_film, 1),
        "film_stars": film_stars,
        "user_genre_count": np.log1p(by_genre[:, 0]),
        "user_genre_mean": smoothed(by_genre, 1),
        "user_residual": user_residual,
        "film_residual": film_residual,
        "expected_stars": expected,
        "user_recent": _recent_mean(user, time, surprise),
        "user_genre_surprise": by_genre[:, 3] / (by_genre[:, 0] + SMOOTHING),
    }, surprise


def _exact(values: np.ndarray) -> np.ndarray:
    """Rounded to 2⁻²⁰, so that float64 sums are exact: a past sum then can't depend on what was added after it."""
    return np.round(values * 2.0**20) / 2.0**20


def _runs(key: np.ndarray, time: np.ndarray):
    """Rows ordered by (key, time); for each place in that order, where its key and its (key, time) run begin."""
    order = np.lexsort((time, key))
    key, time = key[order], time[order]
    new_key = np.diff(key, prepend=key[:1] - 1) != 0
    new_run = new_key | (np.diff(time, prepend=time[:1] - 1) != 0)
    places = np.arange(len(key))
    key_start = np.maximum.accumulate(np.where(new_key, places, 0))
    run_start = np.maximum.accumulate(np.where(new_run, places, 0))
    return order, key_start, run_start


def _past_sums(key: np.ndarray, time: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each row, the sum of `values` [rows, k] over the rows of the same key with a strictly earlier time."""
    order, key_start, run_start = _runs(key, time)
    before = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values[order], axis=0)])
    sums = np.empty_like(before[1:])
    sums[order] = before[run_start] - before[key_start]
    return sums


def _recent_mean(key: np.ndarray, time: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each row, the sum of `values` over the key's latest RECENT rows of earlier times over their number + 1."""
    order, key_start, run_start = _runs(key, time)
    before = np.concatenate([[0.0], np.cumsum(values[order])])
    first = np.maximum(key_start, run_start - RECENT)
    mean = np.empty(len(key))
    mean[order] = (before[run_start] - before[first]) / (run_start - first + 1)
    return mean


def _log_gap(user: np.ndarray, time: np.ndarray) -> np.ndarray:
    order, key_start, run_start = _runs(user, time)
    gap = np.where(run_start > key_start, time[order] - time[order][run_start - 1], 0)
    result = np.empty(len(gap))
    result[order] = np.log1p(gap)
    return result


def _history(ratings: Ratings, chosen: np.ndarray, genre_ids: np.ndarray, surprise: np.ndarray) -> Events:
    """The chosen ratings as events, user by user, with each sample's span: its user's before its second."""
    events = np.flatnonzero(chosen)
    events = events[np.argsort(ratings.user[events], kind="stable")]
    # One increasing number per (user, time), to find both ends of every span by bisection.
    origin = ratings.time.min()
    stride = ratings.time.max() - origin + 1
    place = ratings.user * stride + (ratings.time - origin)
    film = ratings.film[events]
    return Events(
        columns={
            "film": film,
            "genres": genre_ids[film],
            "rating": ratings.stars[events] - 1,
            "surprise": surprise[events],
        },
        time=ratings.time[events],
        start=np.searchsorted(place[events], ratings.user * stride),
        stop=np.searchsorted(place[events], place),
    )


def _multi_hot(flags: np.ndarray) -> np.ndarray:
    """Flags [rows, k] as ids [rows, most flags of a row], -1 as padding."""
    most = int(flags.sum(axis=1).max())
    row, column = np.nonzero(flags)
    ids = np.full((len(flags), most), HOST_PADDING_ID)
    ids[row, np.arange(len(row)) - np.searchsorted(row, row)] = column
    return ids


def _year_ids(year: np.ndarray) -> np.ndarray:
    return np.where(year == 0, 0, np.clip(year, FIRST_YEAR, LAST_YEAR) - FIRST_YEAR + 1)


# --- reading the files ---------------------------------------------------------------------------------------------


def read(directory: str | Path) -> Ratings:
    """Read the files of either format; see `load`."""
    directory = Path(directory)
    if _complete(directory, GROUPLENS_FILES):
        ratings, films, users = (directory / name for name in GROUPLENS_FILES)
        numbers = _read_ratings(ratings, header=None)
        film_ids, films_read = _read_entries(films, "|", 5 + len(GENRES), _grouplens_film, encoding="latin-1")
        user_ids, users_read = _read_entries(users, "|", 5, _user, encoding="latin-1")
    elif _complete(directory, RECBOLE_FILES):
        ratings, films, users = (directory / name for name in RECBOLE_FILES)
        numbers = _read_ratings(ratings, header="user_id:token item_id:token rating:float timestamp:float")
        header = "item_id:token movie_title:token_seq release_year:token class:token_seq"
        film_ids, films_read = _read_entries(films, "\t", 4, _recbole_film, header=header)
        header = "user_id:token age:token gender:token occupation:token zip_code:token"
        user_ids, users_read = _read_entries(users, "\t", 5, _user, header=header)
    else:
        raise FileNotFoundError(
            f"{directory} holds neither {', '.join(GROUPLENS_FILES)} nor {', '.join(RECBOLE_FILES)}; "
            f"`fetch` downloads MovieLens-100K"
        )
    user = _rows_of(ratings, "user", numbers[:, 0], user_ids, users)
    film = _rows_of(ratings, "film", numbers[:, 1], film_ids, films)
    order = np.lexsort((film, user, numbers[:, 3]))
    age, gender, occupation, region = zip(*users_read, strict=True)
    year, genres = zip(*films_read, strict=True)
    occupations, occupation = np.unique(occupation, return_inverse=True)
    return Ratings(
        user=user[order],
        film=film[order],
        stars=numbers[order, 2],
        time=numbers[order, 3],
        age=np.array(age),
        gender=np.array(gender),
        occupation=occupation,
        region=np.array(region),
        year=np.array(year),
        genres=np.array(genres),
        occupations=len(occupations),
    )


def _read_ratings(path: Path, *, header: str | None) -> np.ndarray:
    """int64 [ratings, 4]: user id, film id, stars, time."""
    skip = 0 if header is None else 1
    if header is not None:
        with path.open() as file:
            _check_header(path, file.readline(), header)
    try:
        numbers = np.loadtxt(path, delimiter="\t", skiprows=skip, ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if len(numbers) == 0 or numbers.shape[1] != 4:
        raise ValueError(f"{path}: expected lines of user, film, rating and time, got {list(numbers.shape)} numbers")
    if (bad := (numbers != np.floor(numbers)) | (np.abs(numbers) >= 2.0**53)).any():
        row = int(np.argmax(bad.any(axis=1)))
        raise ValueError(f"{path}, line {row + skip + 1}: {numbers[row].tolist()} are not all whole numbers")
    numbers = numbers.astype(np.int64)
    if (bad := (numbers[:, 2] < 1) | (numbers[:, 2] > 5)).any():
        row = int(np.argmax(bad))
        raise ValueError(f"{path}, line {row + skip + 1}: rating {numbers[row, 2]} is outside 1 to 5")
    return numbers


def _read_entries(
    path: Path, separator: str, width: int, parse: Callable[[list[str]], tuple], *, header: str | None = None,
    encoding: str = "utf-8",
) -> tuple[np.ndarray, list[tuple]]:  # fmt: skip
    """The ids that the lines begin with, in ascending order, and for each what `parse` makes of its line."""
    lines = path.read_text(encoding).splitlines()
    if header is not None:
        _check_header(path, lines[0] if lines else "", header)
    entries = {}
    for number, line in enumerate(lines, start=1):
        if not line or (header is not None and number == 1):
            continue
        fields = line.split(separator)
        try:
            if len(fields) != width:
                raise ValueError(f"{len(fields)} fields divided by {separator!r}, expected {width}")
            if (key := int(fields[0])) in entries:
                raise ValueError(f"id {key} occurs twice")
            entries[key] = parse(fields)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not entries:
        raise ValueError(f"{path}: no entries")
    ids = sorted(entries)
    return np.array(ids), [entries[key] for key in ids]


def _check_header(path: Path, line: str, wanted: str) -> None:
    if line.split() != wanted.split():
        raise ValueError(f"{path}, line 1: the columns are {line.split()}, expected {wanted.split()}")


def _user(fields: list[str]) -> tuple[int, int, str, int]:
    """Age, gender, occupation and region; both formats have the same five fields."""
    _, age, gender, occupation, code = fields
    if not 0 <= int(age) < AGE_LIMIT:
        raise ValueError(f"age {age} is outside [0, {AGE_LIMIT})")
    if gender not in GENDERS:
        raise ValueError(f"gender {gender!r} is none of {GENDERS}")
    return int(age), GENDERS.index(gender), occupation, int(code[0]) if code[:1].isdecimal() else ZIP_REGIONS


def _grouplens_film(fields: list[str]) -> tuple[int, list[bool]]:
    """Year and genre flags. The year is the one that ends the title, as in RecBole's files, not the release date's."""
    if set(fields[5:]) - {"0", "1"}:
        raise ValueError(f"genre flags {fields[5:]} are not all 0 or 1")
    match = re.search(r"\((\d{4})\)\s*$", fields[1])
    return int(match[1]) if match else 0, [flag == "1" for flag in fields[5:]]


def _recbole_film(fields: list[str]) -> tuple[int, list[bool]]:
    names = fields[3].split()
    if unknown := set(names) - set(GENRES):
        raise ValueError(f"unknown genres {sorted(unknown)}; there are {list(GENRES)}")
    return int(fields[2]) if fields[2].isdecimal() else 0, [genre in names for genre in GENRES]


def _rows_of(path: Path, what: str, ids: np.ndarray, known: np.ndarray, source: Path) -> np.ndarray:
    rows = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    if (bad := known[rows] != ids).any():
        place = int(np.argmax(bad))
        raise ValueError(f"{path}, rating {place + 1}: {what} {ids[place]} is not in {source}")
    return rows
