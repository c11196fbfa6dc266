"""The receipt as a page: rows per stage and kind, words as they are."""

from dataclasses import replace

from search.receipt_page import receipt_page
from tests.written_sweeps import receipt
from trainable.outcome import Coverage, LeftOut


def test_weights_of_a_kind_are_one_row_per_stage_with_their_means() -> None:
    one = receipt(dose=0.02)
    effects = (one.effects[0], replace(one.effects[0], applied=0.04, applied_relative=0.04, changed=0.5))
    page = receipt_page(replace(one, effects=(*effects, replace(one.effects[0], stage=2, step=9))))
    assert (
        "<td>1</td><td>1</td><td>rmsnorm</td><td>2</td><td>0.02</td><td>0.03</td><td>3.00%</td><td>75.0%</td>" in page
    )
    assert "<td>2</td><td>9</td><td>rmsnorm</td><td>1</td>" in page


def test_a_receipt_without_noise_says_so_and_names_are_escaped() -> None:
    left = LeftOut(name="a.<b>", weights=1000, reason="computes it itself")
    page = receipt_page(replace(receipt(), coverage=Coverage(weights=1000, left_out=(left,)), warnings=("1 < 2",)))
    assert "None was applied." in page
    assert "left out: a.&lt;b&gt;, 1,000 weights: computes it itself" in page
    assert "1 &lt; 2" in page
