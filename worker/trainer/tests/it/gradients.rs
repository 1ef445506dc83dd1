//! The model's gradients against the unfused model and against finite differences.

use candle_core::Tensor;
use outboard_attention::DType;
use outboard_trainer::{
    Model, ModelConfig, PackedBatch, Parameter, Parameters, TrainConfig, Trainer, TrainerError,
};
use outboard_worker::PackedDocument;

use crate::support::{as_ranks, assert_close, batch, naive, norm, part, small_model};
use crate::unfused;

const LENGTHS: [usize; 4] = [13, 1, 7, 19];

fn gradient(model: &Model, parameters: &Parameters, batch: &PackedBatch, targets: u64) -> Vec<f32> {
    model.forward(batch, &naive(), targets).unwrap().backward(parameters).unwrap()
}

#[test]
fn every_parameter_has_the_gradient_of_the_unfused_model() {
    let config = small_model();
    let parameters = Parameters::new(&config, 7).unwrap();
    let model = Model::new(&config, &parameters, 64).unwrap();
    let batch = batch(0, 0, &LENGTHS);
    let targets = batch.targets();
    assert_eq!(targets, 12 + 6 + 18);

    let expected_loss = unfused::loss(config, &parameters, &batch, targets).unwrap();
    let expected = expected_loss.backward().unwrap();
    let forward = model.forward(&batch, &naive(), targets).unwrap();
    let (found_loss, expected_loss) =
        (forward.loss_sum() / targets as f64, f64::from(expected_loss.to_scalar::<f32>().unwrap()));
    assert!((found_loss - expected_loss).abs() < 1e-5, "{found_loss} {expected_loss}");

    let found = forward.backward(&parameters).unwrap();
    assert_eq!(found.len(), parameters.elements());
    for parameter in &parameters {
        let expected = expected.get(parameter.var()).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        assert_close(parameter.name(), part(&found, parameter), &expected, 1e-5);
    }
}

/// Attention gets what is rounded, as `NaiveAttention` checks, and the gradient stays that of f32 within what rounding
/// moves.
#[test]
fn rounded_attention_has_nearly_the_same_gradient() {
    let config = small_model();
    let parameters = Parameters::new(&config, 7).unwrap();
    let batch = batch(0, 0, &LENGTHS);
    let of = |attention_dtype| {
        let model = Model::new(&ModelConfig { attention_dtype, ..config }, &parameters, 64).unwrap();
        assert_eq!(model.geometry().dtype(), attention_dtype);
        gradient(&model, &parameters, &batch, batch.targets())
    };
    let exact = of(DType::F32);
    for (dtype, tolerance) in [(DType::Bf16, 2e-2), (DType::F16, 2e-3)] {
        let rounded = of(dtype);
        assert_ne!(rounded, exact, "{dtype}: nothing was rounded");
        for parameter in &parameters {
            let name = format!("{dtype} {}", parameter.name());
            assert_close(&name, part(&rounded, parameter), part(&exact, parameter), tolerance);
        }
    }
}

#[test]
fn gradients_are_the_slopes_of_the_loss() {
    let config = small_model();
    let parameters = Parameters::new(&config, 3).unwrap();
    let model = Model::new(&config, &parameters, 64).unwrap();
    let batch = batch(0, 0, &LENGTHS);
    let flat = gradient(&model, &parameters, &batch, 1);
    for parameter in &parameters {
        // Along its own gradient, where the slope is steepest and rounding matters least.
        let slope = norm(part(&flat, parameter));
        let weights = parameter.var().copy().unwrap();
        let direction =
            Tensor::from_slice(part(&flat, parameter), weights.shape(), weights.device()).unwrap();
        let length = 2e-2;
        let loss_at = |by: f64| {
            let moved = (&weights + (&direction * (by / slope)).unwrap()).unwrap();
            parameter.var().set(&moved).unwrap();
            model.forward(&batch, &naive(), 1).unwrap().loss_sum()
        };
        let found = (loss_at(length) - loss_at(-length)) / (2.0 * length);
        parameter.var().set(&weights).unwrap();
        assert!((found / slope - 1.0).abs() < 1e-2, "{}: slope {found}, gradient {slope}", parameter.name());
    }
}

#[test]
fn a_document_does_not_see_its_neighbours() {
    let config = small_model();
    let parameters = Parameters::new(&config, 5).unwrap();
    let model = Model::new(&config, &parameters, 64).unwrap();
    let both = batch(0, 0, &[11, 17]);
    let sums: f64 = both
        .documents
        .iter()
        .map(|document| {
            let rows = outboard_attention::Span::to(document.rows.len());
            let tokens = both.tokens[document.rows.range()].to_vec();
            let alone = PackedBatch::whole(0, vec![PackedDocument::whole(document.id, rows)], tokens);
            model.forward(&alone, &naive(), 1).unwrap().loss_sum()
        })
        .sum();
    let together = model.forward(&both, &naive(), 1).unwrap().loss_sum();
    assert!((sums - together).abs() < 1e-4, "{sums} apart, {together} together");
}

/// The documents of both batches as one rank's.
fn joined(first: &PackedBatch, second: &PackedBatch) -> PackedBatch {
    let lengths: Vec<usize> =
        first.documents.iter().chain(second.documents.iter()).map(|document| document.rows.len()).collect();
    PackedBatch { tokens: [&*first.tokens, &*second.tokens].concat(), ..batch(first.step, 0, &lengths) }
}

#[test]
fn two_ranks_have_the_gradient_of_one_with_their_documents() {
    let config = small_model();
    let parameters = Parameters::new(&config, 11).unwrap();
    let model = Model::new(&config, &parameters, 64).unwrap();
    let (first, second) = (batch(0, 0, &[13, 5]), batch(0, 1, &[2, 21, 9]));
    let joined = joined(&first, &second);
    let targets = joined.targets();
    assert_eq!(targets, first.targets() + second.targets());
    let mut sum = gradient(&model, &parameters, &first, targets);
    let other = gradient(&model, &parameters, &second, targets);
    sum.iter_mut().zip(&other).for_each(|(sum, g)| *sum += g);
    let whole = gradient(&model, &parameters, &joined, targets);
    for parameter in &parameters {
        assert_close(parameter.name(), part(&sum, parameter), part(&whole, parameter), 1e-5);
    }

    let train = |rank, ranks, batch: &PackedBatch, mut exchange| {
        let config = TrainConfig { ranks, rank, tokens: 64, seed: 11, ..TrainConfig::default() };
        let mut trainer = Trainer::new(&small_model(), &config, naive()).unwrap();
        trainer.step(batch, &mut exchange).unwrap()
    };
    let alone = train(0, 1, &joined, outboard_trainer::Exchange::alone());
    let outcomes = as_ranks(2, std::time::Duration::from_secs(20), |exchange| {
        let rank = exchange.rank();
        train(rank as u32, 2, [&first, &second][rank], exchange)
    });
    assert_eq!(outcomes[0].loss.to_bits(), outcomes[1].loss.to_bits());
    assert_eq!(outcomes[0].gradient_norm.to_bits(), outcomes[1].gradient_norm.to_bits());
    for outcome in &outcomes {
        assert_eq!(outcome.targets, targets);
        assert!((outcome.loss / alone.loss - 1.0).abs() < 1e-6);
        assert!((outcome.gradient_norm / alone.gradient_norm - 1.0).abs() < 1e-5);
    }
}

#[test]
fn weights_depend_on_seed_and_name_alone() {
    let config = small_model();
    let deeper = ModelConfig { layers: 3, ..config };
    let values = |parameters: &Parameters, name: &str| {
        parameters.get(name).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let (first, again) = (Parameters::new(&config, 1).unwrap(), Parameters::new(&config, 1).unwrap());
    let (other_seed, deeper) = (Parameters::new(&config, 2).unwrap(), Parameters::new(&deeper, 1).unwrap());
    let mut names: Vec<&str> = first.iter().map(Parameter::name).collect();
    for name in &names {
        assert_eq!(values(&first, name), values(&again, name), "{name}");
    }
    assert!(names.is_sorted());
    names.dedup();
    assert_eq!(names.len(), 3 + 2 * 8);
    let (q, q1) = ("layer.0000.attention.q", "layer.0001.attention.q");
    assert_eq!(values(&first, q), values(&deeper, q));
    assert_ne!(values(&first, q), values(&first, q1));
    assert_ne!(values(&first, q), values(&other_seed, q));
    let embedding = values(&first, "embedding");
    let mean = embedding.iter().sum::<f32>() / embedding.len() as f32;
    let deviation = (norm(&embedding).powi(2) / embedding.len() as f64).sqrt();
    assert!(mean.abs() < 0.02 && (deviation - 0.5).abs() < 0.02, "{mean} {deviation}");
}

#[test]
fn an_unknown_parameter_is_an_error() {
    let parameters = Parameters::new(&small_model(), 1).unwrap();
    assert!(matches!(parameters.get("no such"), Err(TrainerError::InvalidConfig { field: "parameter", .. })));
}
