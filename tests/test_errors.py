from pymathrl.errors import UserError, nearest


def test_nearest_names_the_closest_and_lists_all():
    assert nearest("rovr", ["grpo", "rover"]) == "did you mean 'rover'? (valid: grpo, rover)"
    assert nearest("x", []) == "valid: none"


def test_user_error_is_its_message():
    assert str(UserError("say what to do")) == "say what to do"
