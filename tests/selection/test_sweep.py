import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_unlearn.artifacts import LayerScore
from falcon_unlearn.errors import UserError
from falcon_unlearn.selection.sweep import TrialOutcome, spaced_candidates, split_validation, sweep


class TestSplit:
    @given(
        groups=st.lists(st.integers(0, 12), min_size=2).filter(lambda g: len(set(g)) > 1),
        share=st.floats(0.01, 0.99),
        seed=st.integers(0, 99),
    )
    def test_divides_whole_groups(self, groups, share, seed):
        training, validation = split_validation(groups, share, seed)
        assert training
        assert validation
        assert sorted(training + validation) == list(range(len(groups)))
        held, kept = {groups[i] for i in validation}, {groups[i] for i in training}
        assert not held & kept
        assert abs(len(held) - share * len(set(groups))) <= 1
        assert (training, validation) == split_validation(groups, share, seed)

    def test_depends_on_the_seed(self):
        draws = {tuple(split_validation(range(40), 0.25, seed)[1]) for seed in range(5)}
        assert len(draws) == 5
        assert {len(draw) for draw in draws} == {10}

    def test_is_not_the_order_of_the_corpus(self):
        """Records of one subject stand together: a split off the end would hold out whole subjects."""
        assert split_validation(range(40), 0.25, 0)[1] != list(range(30, 40))

    @pytest.mark.parametrize("groups", [["a"], ["a", "a", "a"]])
    def test_a_single_group_stands_on_both_sides(self, groups):
        assert split_validation(groups, 0.25, 0) == (list(range(len(groups))),) * 2


class TestCandidates:
    @given(layers=st.integers(1, 120), most=st.integers(1, 40))
    def test_are_evenly_spaced_with_both_ends(self, layers, most):
        found = spaced_candidates(layers, most)
        assert len(found) == min(most, layers)
        assert list(found) == sorted(set(found))
        assert found[-1] == layers - 1
        if len(found) > 1:
            assert found[0] == 0
            gaps = [b - a for a, b in itertools.pairwise(found)]
            assert max(gaps) - min(gaps) <= 1

    @given(layers=st.integers(1, 40), most=st.integers(2, 10), data=st.data())
    def test_start_at_the_lowest(self, layers, most, data):
        lowest = data.draw(st.integers(0, layers - 1))
        found = spaced_candidates(layers, most, lowest=lowest)
        assert found[0] == lowest
        assert found[-1] == layers - 1

    def test_examples(self):
        assert spaced_candidates(6, 6) == (0, 1, 2, 3, 4, 5)
        assert spaced_candidates(33, 5) == (0, 8, 16, 24, 32)
        assert spaced_candidates(12, 1) == (11,)


class TestSweep:
    @staticmethod
    def of(outcomes):
        return sweep(list(outcomes), lambda layer: TrialOutcome(*outcomes[layer]))

    def test_best_is_what_forgets_and_keeps(self):
        best, scores = self.of({0: (0.9, 1.0), 3: (0.1, 0.9), 5: (0.0, 0.3)})
        assert best == 3
        assert scores[1] == LayerScore(3, pytest.approx(0.8), {"forget_left": 0.1, "retain_kept": 0.9})
        assert [s.layer for s in scores] == [0, 3, 5]

    @pytest.mark.parametrize("order", [(2, 4), (4, 2)])
    def test_of_equals_the_lower_layer_wins(self, order):
        assert self.of(dict.fromkeys(order, (0.25, 0.75)))[0] == 2

    def test_doing_nothing_scores_zero_and_perfection_one(self):
        _, scores = self.of({0: (1.0, 1.0), 1: (0.0, 1.0), 2: (0.0, 1.7)})
        assert [s.score for s in scores] == [0.0, 1.0, 1.0]

    @pytest.mark.parametrize("bad", [(math.nan, 1.0), (0.0, math.nan), (math.inf, 1.0), (math.nan, math.nan)])
    def test_a_trial_without_a_number_never_wins(self, bad):
        best, scores = self.of({0: bad, 1: (5.0, 0.0), 2: bad})
        assert best == 1
        assert [s.score for s in scores] == [-math.inf, -5.0, -math.inf]

    def test_no_number_at_all_is_no_choice(self):
        with pytest.raises(UserError, match="the trial diverged at every layer"):
            self.of({0: (math.nan, 1.0), 1: (math.nan, math.nan)})

    def test_each_candidate_is_tried_once_in_order(self):
        tried = []

        def trial(layer):
            tried.append(layer)
            return TrialOutcome(0.5, 0.5)

        sweep((5, 1, 3), trial)
        assert tried == [5, 1, 3]
