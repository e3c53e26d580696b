"""How many random examples a property test takes: a share of them by default, all with --slow, very many on demand."""

from hypothesis import settings

SHARES = {"quick": 0.3, "slow": 1.0, "long": 200.0}  # by the name of a profile of Hypothesis
_DEFAULT = 100  # of a test that names no number
_LEAST = 3


def register_profiles() -> None:
    """Registers the profiles, of which "quick" counts from now on; all but "long" draw the same examples each time."""
    for name, share in SHARES.items():
        repeats = {"derandomize": True} if name != "long" else {}
        settings.register_profile(name, max_examples=round(share * _DEFAULT), deadline=None, database=None, **repeats)
    settings.load_profile("quick")


def examples(count: int) -> settings:
    """Returns settings for so many examples with --slow, and for the profile's share of them otherwise.

    "long" asks every test for 20,000.
    """
    most = settings.default.max_examples
    return settings(max_examples=most if most > _DEFAULT else max(_LEAST, count * most // _DEFAULT))
