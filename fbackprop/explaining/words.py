"""The fixed words of an explanation, in English and in Korean."""

from typing import Any

__all__ = ["LANGUAGES", "OPS", "WORDS", "said"]

LANGUAGES = ("en", "ko")

WORDS: dict[str, tuple[str, str]] = {
    # What an explanation says.
    "title": ("The backward pass of {name}", "{name}의 역전파"),
    "summary": (
        "{steps} op calls. The output L is {value}. For the backward pass {bytes} are kept.",
        "연산 호출 {steps}회, 출력 L = {value}. 역전파를 위해 보관하는 양: {bytes}.",
    ),
    "summary_many": (
        "{steps} op calls. For the backward pass {bytes} are kept.",
        "연산 호출 {steps}회. 역전파를 위해 보관하는 양: {bytes}.",
    ),
    "real": (
        "Every number is the one that training computes: each op ran its own forward and its own backward.",
        "여기 있는 모든 수는 학습에서 실제로 계산되는 값이다. 각 연산이 자신의 순전파와 역전파를 그대로 실행했다.",
    ),
    "agrees": (
        "The gradients are those of `jax.grad`; the largest difference is {difference}.",
        "기울기는 `jax.grad`의 결과와 일치한다(최대 차이 {difference}).",
    ),
    "disagrees": (
        "The gradients are not those of `jax.grad`: they differ by up to {difference}.",
        "기울기가 `jax.grad`의 결과와 다르다. 최대 차이: {difference}.",
    ),
    "reading": (
        "`dx` stands for ∂L/∂x: how much the output L changes with x. The forward pass goes from the arguments to L; the "
        "backward pass starts at L, where dL = 1, and hands these gradients back, op by op. Each op multiplies what "
        "arrives from above by its own derivative: the chain rule.",
        "`dx`는 ∂L/∂x, 곧 x가 변할 때 출력 L이 변하는 정도(기울기)를 뜻한다. 순전파는 인자에서 L로 나아가고, 역전파는 dL "
        "= 1인 L에서 출발하여 연산을 하나씩 거슬러 올라가며 기울기를 전달한다. 각 연산은 위에서 내려온 기울기에 자신의 "
        "미분을 곱한다. 이것이 연쇄 법칙이다.",
    ),
    "picture": ("The flow of values and gradients", "값과 기울기의 흐름"),
    "picture_words": (
        "{steps} op calls in order. Solid arrows: the forward pass, with the shapes of the values. Dashed arrows: the "
        "backward pass, with the norms ‖d‖ of the gradients.",
        "연산 호출 {steps}회를 순서대로 그렸다. 실선 화살표: 순전파와 값의 모양. 점선 화살표: 역전파와 기울기의 크기 ‖d‖.",
    ),
    "forward": ("Forward pass", "순전파"),
    "forward_why": (
        "The forward pass comes first, because the derivatives are made of its values.",
        "역전파에 쓰이는 미분은 순전파에서 계산한 값으로 이루어지므로 순전파를 먼저 실행한다.",
    ),
    "loss": ("Output", "출력"),
    "loss_from": ("{name} comes from {source}.", "{name}의 출처: {source}."),
    "backward": ("Backward pass", "역전파"),
    "backward_how": (
        "From the last op to the first: what arrives at the output of an op, and what the op hands to its inputs and "
        "parameters.",
        "마지막 연산에서 첫 연산으로 거슬러 간다. 각 연산의 출력에 도착한 기울기와, 연산이 입력과 매개변수에 전달하는 "
        "기울기를 보인다.",
    ),
    "gradients": ("Gradients of the arguments", "인자의 기울기"),
    "kept": ("Kept for the backward pass", "역전파를 위해 보관하는 값"),
    "kept_caption": (
        "{bytes} in all, of which {given} are arguments that exist anyway. What a step before keeps already counts once.",
        "모두 {bytes}, 그중 {given}는 어차피 있는 인자이다. 앞 단계에서 이미 보관한 배열은 한 번만 센다.",
    ),
    "takes": ("Takes: {names}.", "입력: {names}."),
    "upstream": ("Arrives from above", "위에서 도착한 기울기"),
    "hands": ("Handed on", "전달하는 기울기"),
    "keeps": ("Keeps for the backward pass: {names}.", "역전파를 위해 보관: {names}."),
    "keeps_nothing": ("Keeps nothing for the backward pass.", "역전파를 위해 보관하는 값이 없다."),
    "unreached": (
        "The output does not depend on this call, so no backward pass ran.",
        "출력이 이 연산에 의존하지 않으므로 역전파를 실행하지 않았다.",
    ),
    "options": ("Options: {options}.", "설정: {options}."),
    "derivation": ("The derivation", "유도"),
    "straight": (
        "This rule is not the derivative of what the forward computes, by intent.",
        "이 규칙은 일부러 순전파의 미분과 다르게 정한 것이다.",
    ),
    "step": ("step {index}", "{index}단계"),
    "of_step": ("{name} of step {index}", "{index}단계의 {name}"),
    "constant": ("a constant", "상수"),
    "through": ("{source}, by {names}", "{source} (거친 연산: {names})"),
    "and": (" and ", ", "),
    "from": ("from {source}", "출처: {source}"),
    # Columns.
    "column_step": ("step", "단계"),
    "column_op": ("op", "연산"),
    "column_name": ("name", "이름"),
    "column_shape": ("shape", "모양"),
    "column_dtype": ("dtype", "자료형"),
    "column_bytes": ("bytes", "바이트"),
    "column_what": ("what it is", "종류"),
    "column_norm": ("‖gradient‖", "‖기울기‖"),
    "column_largest": ("largest", "최댓값"),
    "column_argument": ("argument", "인자"),
    "column_value_norm": ("‖value‖", "‖값‖"),
    "column_factor": ("factor", "인수"),
    "column_derivative": ("derivative", "미분"),
    "column_value": ("value", "값"),
    "column_label": ("kind", "구분"),
    "keeping_title": ("Bytes that {name} keeps for its backward pass", "{name}: 역전파를 위해 보관하는 바이트"),
    "keeping_about": (
        "{total} in all, each array once. Parameters and other arguments exist anyway: {parameters} and {arguments}. For the "
        "backward pass alone: {own}.",
        "모두 {total}, 각 배열은 한 번만 센다. 어차피 있는 매개변수: {parameters}, 다른 인자: {arguments}. 역전파만을 위한 양: "
        "{own}.",
    ),
    "keeping_rivals": ("The same gradient in other ways", "같은 기울기를 구하는 다른 방법"),
    "keeping_rivals_about": (
        "Matrix products of forward and backward together, the least as 1.",
        "행렬곱: 순전파와 역전파를 합친 연산량이며, 가장 적은 방법을 1로 한다.",
    ),
    "way_rules": ("these rules", "이 규칙"),
    "way_definitions": ("autodiff of the definitions", "정의의 자동 미분"),
    "no_policy": ("no policy", "정책 없음"),
    "keeping_hints": ("What to change", "바꿀 수 있는 것"),
    "hint_least": (
        "{op} keeps {kept}, arguments included, where {least} is the least for any rule.",
        "{op}: 인자를 포함해 {kept} 보관. 어떤 규칙에든 필요한 최소량은 {least}.",
    ),
    "hint_least_of_calls": (
        "{op} keeps {kept} in {calls} calls, arguments included, where {least} is the least for any rule.",
        "{op}: 호출 {calls}회에서 인자를 포함해 {kept} 보관. 어떤 규칙에든 필요한 최소량은 {least}.",
    ),
    "hint_logits": (
        "`linear_cross_entropy(x, kernel, labels)` in place of dense and {loss} never forms the logits {shape}: it keeps "
        "{less} less.",
        "dense와 {loss} 대신 `linear_cross_entropy(x, kernel, labels)`를 쓰면 로짓 {shape} 배열을 만들지 않아 {less} 덜 "
        "보관한다.",
    ),
    "hint_mask": (
        "{op} keeps a mask with a byte for each element, {kept}; in bits it would be {bits}.",
        "{op}: 원소마다 1바이트인 마스크 {kept} 보관. 비트로 저장하면 {bits}.",
    ),
    "hint_mask_of_jax": (
        "JAX, for its {op}, keeps a mask with a byte for each element, {kept}; in bits it would be {bits}.",
        "JAX 연산 {op}: 원소마다 1바이트인 마스크 {kept} 보관. 비트로 저장하면 {bits}.",
    ),
    "hint_plain": (
        "{kept} are kept by JAX for its own operations, most of it the output of {op} {array}: an op in their place may keep "
        "less (`fb.accelerate` looks for some).",
        "JAX가 자신의 연산을 위해 보관하는 양: {kept}. 가장 큰 것은 {op}의 출력 {array}. 그 자리에 이 라이브러리의 연산을 쓰면 "
        "덜 보관할 수 있다(`fb.accelerate`가 바꿀 곳을 찾아 준다).",
    ),
    "hint_narrower": (
        "{kept} of activations are {dtype}; in {narrow} they would be {less} less (`dtype=` of the layers).",
        "활성값 {kept}의 자료형은 {dtype}. {narrow} 자료형으로 계산하면 {less} 줄어든다(층의 `dtype=`).",
    ),
    "hint_blocks": (
        '`checkpoint="full"` of the model keeps {kept} in all, and runs each block twice.',
        '모델의 `checkpoint="full"`: 모두 {kept} 보관하고 블록마다 두 번 실행한다.',
    ),
    "hint_checkpoint": (
        "jax.checkpoint, {policy}, around the definitions keeps {kept} in all.",
        "정의를 jax.checkpoint({policy})로 감싸면 모두 {kept} 보관한다.",
    ),
    "hint_checkpoint_products": (
        "jax.checkpoint, {policy}, around the definitions keeps {kept} in all, with {times} times the matrix products.",
        "정의를 jax.checkpoint({policy})로 감싸면 모두 {kept} 보관하고, 행렬곱 연산량은 {times}배가 된다.",
    ),
    "column_maker": ("made by", "만든 연산"),
    "column_keepers": ("kept by", "보관하는 연산"),
    "column_array": ("array", "배열"),
    "more": ("{count} more", "그 밖의 {count}개"),
    "column_way": ("way", "방법"),
    "column_size": ("size", "크기"),
    "column_products": ("matrix products", "행렬곱"),
    "column_path": ("path", "경로"),
    "column_product": ("product", "곱"),
    "column_share": ("share", "비율"),
    "origin_parameter": ("parameter", "매개변수"),
    "origin_argument": ("argument", "인자"),
    "origin_output": ("output of an op", "연산의 출력"),
    "origin_computed": ("computed in between", "중간에 계산한 값"),
    "origin_own": ("made for the backward", "역전파용으로 만든 값"),
    "again": ("kept before", "이미 보관함"),
    # The factors of a chain, with the labels of the first document: 액, 웨, …, 액, 앤.
    "factor_loss": ("loss", "손실"),
    "factor_activation": ("activation", "액 (활성화 함수)"),
    "factor_weight": ("weight", "웨 (가중치)"),
    "factor_input": ("input", "앤 (입력값)"),
    "factor_bias": ("bias", "편향"),
    "factor_norm": ("norm", "정규화"),
    "factor_pool": ("pool", "풀링"),
    "factor_mask": ("mask", "마스크"),
    "factor_op": ("op", "연산"),
    "factor_jax": ("JAX", "JAX 연산"),
    "factor_cotangent": ("given", "주어진 값"),
    "chain_title": ("The chain rule for {place}", "{place}에 대한 연쇄 법칙"),
    "chain_about": (
        "The weight reaches the output on {count} paths. On each of them the derivatives of all ops are multiplied, from "
        "the loss back to the weight; the gradient is the sum over all paths. One path alone is not the gradient.",
        "이 가중치가 출력에 이르는 경로는 {count}개이다. 경로마다 손실에서 가중치까지 거슬러 가며 각 연산의 미분을 "
        "곱하고, 모든 경로의 곱을 더한 것이 기울기이다. 경로 하나만으로는 기울기가 되지 않는다.",
    ),
    "chain_one": (
        "The weight reaches the output on a single path, so the gradient is one product: the derivatives of all ops, "
        "from the loss back to the weight.",
        "이 가중치가 출력에 이르는 경로는 하나뿐이므로 기울기는 하나의 곱이다. 손실에서 가중치까지 거슬러 가며 각 연산의 "
        "미분을 곱한다.",
    ),
    "chain_many": (
        "The weight reaches the output on {count} paths, too many to list. So the sum is taken op by op, in vector form; "
        "the paths below are the largest that a search found, not all of them.",
        "이 가중치가 출력에 이르는 경로는 {count}개로, 모두 적기에는 너무 많다. 그래서 합은 연산마다 벡터 형태로 구했고, "
        "아래의 경로는 탐색으로 찾은 큰 것들이며 전부가 아니다.",
    ),
    "uncounted": ("uncounted", "셀 수 없이 많은 수"),
    "chain_none": (
        "The weight does not reach the output: its gradient is 0.",
        "이 가중치는 출력에 이르지 않으므로 기울기는 0이다.",
    ),
    "chain_factors": ("loss · activation · weight · … · activation · input", "손실 · 액 · 웨 · … · 액 · 앤"),
    "chain_labels": (
        "Loss, then activation and weight in turn, at the end activation and input.",
        "손실 다음에 액(활성화 함수의 미분)과 웨(가중치)가 번갈아 나오고, 액과 앤(가중치에 곱해지는 입력값)으로 끝난다.",
    ),
    "chain_path": ("The factors of the largest path", "가장 큰 경로의 인수"),
    "chain_vector": ("All paths at once, op by op", "모든 경로를 한꺼번에, 연산마다"),
    "chain_vector_about": (
        "At each op: the sum of (gradient that arrives) × (derivative of the op's output with respect to the weight) "
        "over the elements of the output. Where all paths cross, it is the gradient.",
        "연산마다 출력의 원소에 대해 (도착한 기울기) × (가중치에 대한 출력의 미분)을 더한 값이다. 모든 경로가 지나는 "
        "곳에서는 이 값이 곧 기울기이다.",
    ),
    "chain_sum": (
        "The sum over all paths is {total}; the backward pass gave {gradient}. They differ by {difference}.",
        "모든 경로의 합: {total}. 역전파가 계산한 기울기: {gradient}. 차이: {difference}.",
    ),
    "chain_rest": ("the other {count} paths", "나머지 경로 {count}개"),
    "chain_total": ("sum", "합"),
    "column_total": ("Σ parts", "성분의 합"),
    "column_upstream": ("‖gradient‖", "‖기울기‖"),
    "column_local": ("‖derivative‖", "‖미분‖"),
    # Numbers.
    "statistic_min": ("min", "최소"),
    "statistic_mean": ("mean", "평균"),
    "statistic_max": ("max", "최대"),
    "statistic_norm": ("norm", "노름"),
    "not_finite": ("{count} not finite", "유한하지 않은 원소 {count}개"),
    "heat_words": ("{name}: blue below zero, red above", "{name}: 음수는 파랑, 양수는 빨강"),
    # The page.
    "open_all": ("Open all", "모두 펼치기"),
    "close_all": ("Close all", "모두 접기"),
    "contents": ("Contents", "차례"),
    "note": ("Note", "참고"),
    "page_hint": (
        "Point at a number, or reach it with the Tab and arrow keys, to see its formula and all of its digits.",
        "수에 마우스를 올리거나 Tab 키와 방향 키로 옮겨 가면 식과 모든 자릿수가 보인다.",
    ),
    "legend_forward": ("forward: shape of the value", "순전파: 값의 모양"),
    "legend_backward": ("backward: norm of the gradient", "역전파: 기울기의 노름"),
    "folded": ("{count} × {ops}", "{count} × {ops}"),
    "repeated": ("the same {count} more times", "같은 구조 {count}번 더"),
}
"""For each key the English and the Korean, with places for what differs."""


OPS: dict[str, str] = {
    "dense": "완전 연결층: 입력에 가중치를 곱하고 편향을 더한다.",
    "conv": "합성곱: 필터를 1차원에서 3차원까지의 공간 위로 옮겨 가며 곱해 더한다.",
    "conv_transpose": "전치 합성곱: 합성곱의 역방향으로 공간을 넓힌다.",
    "embed": "임베딩: 번호에 해당하는 행을 표에서 꺼낸다.",
    "einsum_dense": "아인슈타인 표기로 쓴 선형층.",
    "lora_dense": "고정된 가중치에 학습하는 저차원 갱신을 더한 완전 연결층.",
    "relu": "활성화 함수: 양수는 그대로, 나머지는 0.",
    "relu6": "0과 6 사이로 자른 relu.",
    "leaky_relu": "음수에서도 작은 기울기를 남기는 relu.",
    "sigmoid": "시그모이드: 값을 0과 1 사이로 옮긴다.",
    "tanh": "쌍곡탄젠트: 값을 −1과 1 사이로 옮긴다.",
    "silu": "시그모이드를 곱한 활성화 함수(swish).",
    "gelu": "정규 분포의 누적 확률을 곱한 활성화 함수.",
    "softplus": "relu를 매끄럽게 한 함수.",
    "elu": "음수에서 지수 함수로 이어지는 relu.",
    "step_ste": "계단 함수. 역전파에서는 기울기를 그대로 통과시킨다.",
    "sign_ste": "부호 함수. 역전파에서는 기울기를 그대로 통과시킨다.",
    "softmax": "소프트맥스: 합이 1인 확률로 바꾼다.",
    "log_softmax": "소프트맥스의 로그.",
    "logsumexp": "지수의 합의 로그.",
    "softmax_cross_entropy_with_integer_labels": "소프트맥스와 교차 엔트로피 손실. 정답은 번호로 준다.",
    "softmax_cross_entropy": "소프트맥스와 교차 엔트로피 손실. 정답은 확률로 준다.",
    "sigmoid_binary_cross_entropy": "시그모이드와 이진 교차 엔트로피 손실.",
    "linear_cross_entropy": "어휘로의 선형 변환과 교차 엔트로피 손실을 합친 연산.",
    "sum_of_squares": "오차 제곱의 합.",
    "half_square": "오차 제곱의 합의 절반.",
    "mean_squared_error": "평균 제곱 오차.",
    "max_pool": "최대 풀링: 각 창에서 가장 큰 값을 고른다.",
    "min_pool": "최소 풀링: 각 창에서 가장 작은 값을 고른다.",
    "avg_pool": "평균 풀링: 각 창의 평균을 낸다.",
    "sum_pool": "합 풀링: 각 창의 값을 더한다.",
    "global_avg_pool": "전역 평균 풀링: 이미지 전체의 평균을 낸다.",
    "global_max_pool": "전역 최대 풀링: 이미지 전체에서 가장 큰 값을 고른다.",
    "layer_norm": "층 정규화: 벡터마다 평균을 0, 분산을 1로 맞춘 뒤 배율과 편향을 적용한다.",
    "rms_norm": "RMS 정규화: 벡터마다 제곱 평균을 1로 맞춘다.",
    "batch_norm": "배치 정규화: 특징마다 배치 전체의 평균을 0, 분산을 1로 맞춘다.",
    "group_norm": "그룹 정규화: 채널 묶음마다 평균을 0, 분산을 1로 맞춘다.",
    "instance_norm": "인스턴스 정규화: 예제와 채널마다 평균을 0, 분산을 1로 맞춘다.",
    "dropout": "드롭아웃: 일부 값을 무작위로 0으로 만든다.",
    "dot_product_attention": "내적 어텐션: 질의마다 키와의 유사도로 값을 가중 평균한다.",
    "norm_dense": "정규화와 그 뒤의 완전 연결층을 합친 연산.",
    "residual_norm": "잔차를 더한 뒤 정규화하는 연산.",
    "gelu_mlp": "트랜스포머의 순방향 블록: 완전 연결층, gelu, 완전 연결층.",
    "swiglu_mlp": "트랜스포머의 게이트 순방향 블록(silu).",
    "geglu_mlp": "트랜스포머의 게이트 순방향 블록(gelu).",
    "rotary_embedding": "회전 위치 임베딩: 위치에 따라 성분 쌍을 회전시킨다.",
    "rnn": "순환 신경망을 시퀀스 전체에 적용한다.",
    "lstm": "LSTM을 시퀀스 전체에 적용한다.",
    "gru": "GRU를 시퀀스 전체에 적용한다.",
}
"""What an op is, in Korean. In English its docstring says it; an op that is missing here shows that."""


def said(key: str, lang: str, **values: Any) -> str:
    """The words of a key in a language, with these values in their places.

    Raises:
      ValueError: where there is no such language.
    """
    if lang not in LANGUAGES:
        raise ValueError(f"explain: there is no language {lang!r}; known are {', '.join(LANGUAGES)}.")
    return WORDS[key][LANGUAGES.index(lang)].format(**values)
