"""The fit against scikit-learn's most exact solver, over shapes, classes and penalties."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from histossl.evaluate.logistic import predict, prepare, solve


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("C", [0.01, 10.0, 1000.0])
@pytest.mark.parametrize(("n", "d", "classes"), [(200, 7, 2), (20, 60, 2), (150, 12, 4), (15, 40, 3)])
def test_it_is_the_solution_that_scikit_learn_finds(n, d, classes, C, balanced):
    rng = np.random.default_rng(n)
    y = np.minimum(rng.geometric(0.5, size=n) - 1, classes - 1)
    y[:classes] = np.arange(classes)
    x = rng.normal(size=(n, d)) * np.logspace(0, -1, d) + y[:, None] * 0.3 / d**0.5
    x[:, -1] = x[:, 0] + x[:, 1]  # not of full rank
    model = LogisticRegression(
        C=C, class_weight="balanced" if balanced else None, solver="newton-cg", tol=1e-10, max_iter=1000
    )
    w, b, finished = solve(prepare(x, y, balanced), C)
    assert finished
    assert w.shape == (d, 1 if classes == 2 else classes)
    fresh = rng.normal(size=(50, d))
    np.testing.assert_allclose(
        predict(fresh, w, b), model.fit(x, y).predict_proba(fresh), atol=2e-4 if C < 100 else 2e-3
    )


def test_features_without_any_spread_and_one_feature_are_no_obstacle():
    y = np.arange(10) % 2
    flat = solve(prepare(np.zeros((10, 3)), y, True), 10.0)
    np.testing.assert_allclose(predict(np.zeros((1, 3)), flat[0], flat[1]), 0.5)
    one = solve(prepare(y[:, None] - 0.5, y, True), 10.0)
    assert (predict(np.array([[-1.0], [1.0]]), one[0], one[1]).argmax(axis=1) == [0, 1]).all()
