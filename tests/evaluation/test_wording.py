"""Numbers for people: one kind of minus everywhere."""

from utils.evaluation.wording import MINUS, change_in_words, number, short, signed


def test_there_is_one_kind_of_minus():
    texts = [number(-0.12345), signed(-0.12345), short(-1234567.0), short(-1e-7), change_in_words(-0.1, (-0.2, -0.05))]
    assert texts[:4] == [f"{MINUS}0.123", f"{MINUS}0.123", f"{MINUS}1.235e+06", f"{MINUS}1e{MINUS}07"]
    assert not any("-" in text for text in texts)
    assert (number(None), number(0.5), signed(0.5), short(0.25)) == ("", "0.500", "+0.500", "0.25")
    assert (number(-0.0001), signed(-0.0001), signed(-0.0)) == ("0.000", "+0.000", "+0.000")
    assert change_in_words(0.1, None) == "+0.100"
