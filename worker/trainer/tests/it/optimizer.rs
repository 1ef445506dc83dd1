//! AdamW against its formula.

use outboard_trainer::{AdamW, Parameters, TrainConfig, TrainerError, global_norm, learning_rate};

use crate::support::small_model;

#[test]
fn updates_follow_the_formula() {
    let config = TrainConfig { steps: 10, warmup_steps: 1, clip_norm: 1e9, ..TrainConfig::default() };
    let parameters = Parameters::new(&small_model(), 0).unwrap();
    let mut optimizer = AdamW::new(&config, &parameters).unwrap();
    let before: Vec<Vec<f32>> =
        parameters.iter().map(|p| p.var().flatten_all().unwrap().to_vec1().unwrap()).collect();
    let gradient = |step: u64| -> Vec<f32> {
        (0..parameters.elements()).map(|i| ((i as f32 + step as f32) * 0.37).sin() * 0.1).collect()
    };
    for step in 0..3 {
        let update = optimizer.update(step, &parameters, &mut gradient(step)).unwrap();
        assert_eq!(update.learning_rate, learning_rate(&config, step));
    }
    for (parameter, before) in parameters.iter().zip(&before) {
        let after: Vec<f32> = parameter.var().flatten_all().unwrap().to_vec1().unwrap();
        let decay = if parameter.decays() { config.weight_decay } else { 0.0 };
        for index in [0, before.len() - 1] {
            let (mut w, mut m, mut v) = (f64::from(before[index]), 0.0, 0.0);
            for step in 0..3 {
                let g = f64::from(gradient(step)[parameter.offset() + index]);
                let rate = learning_rate(&config, step);
                m = config.beta1 * m + (1.0 - config.beta1) * g;
                v = config.beta2 * v + (1.0 - config.beta2) * g * g;
                let t = step as i32 + 1;
                let (m, v) = (m / (1.0 - config.beta1.powi(t)), v / (1.0 - config.beta2.powi(t)));
                w = w * (1.0 - rate * decay) - rate * m / (v.sqrt() + config.epsilon);
            }
            assert!((w - f64::from(after[index])).abs() < 1e-5, "{} [{index}]: {w}", parameter.name());
        }
    }
}

#[test]
fn long_gradients_are_clipped_and_bad_ones_refused() {
    let config = TrainConfig { clip_norm: 0.5, ..TrainConfig::default() };
    let parameters = Parameters::new(&small_model(), 0).unwrap();
    let mut optimizer = AdamW::new(&config, &parameters).unwrap();
    let mut gradient = vec![1.0; parameters.elements()];
    let length = (parameters.elements() as f64).sqrt();
    let update = optimizer.update(0, &parameters, &mut gradient).unwrap();
    assert!((update.gradient_norm / length - 1.0).abs() < 1e-6);
    assert!((global_norm(&parameters, &gradient) - 0.5).abs() < 1e-5);

    let weights = |name| parameters.get(name).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let before = weights("head");
    gradient[5] = f32::NAN;
    let error = optimizer.update(4, &parameters, &mut gradient).unwrap_err();
    assert!(matches!(error, TrainerError::NotFinite { step: 4, .. }), "{error}");
    assert!(optimizer.update(4, &parameters, &mut gradient[1..]).is_err());
    assert_eq!(before, weights("head"));
}

#[test]
fn the_learning_rate_rises_and_falls() {
    let config = TrainConfig { steps: 100, warmup_steps: 10, learning_rate: 1.0, ..TrainConfig::default() };
    let rates: Vec<f64> = (0..200).map(|step| learning_rate(&config, step)).collect();
    assert!(rates[..11].is_sorted() && rates[0] > 0.0 && rates[10] == 1.0);
    assert!(rates[10..].is_sorted_by(|a, b| a >= b));
    assert!((rates[100] - 0.1).abs() < 1e-12 && (rates[199] - 0.1).abs() < 1e-12);
    for steps in [0, 1, 5, 10] {
        let short = TrainConfig { steps, ..config };
        assert!((0..20).all(|step| (0.0..=1.0).contains(&learning_rate(&short, step))));
    }
}
