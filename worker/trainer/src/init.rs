//! The parameters: their names, shapes and first values.

use candle_core::{Device, Tensor, Var};

use crate::rng::Rng;
use crate::{ModelConfig, TrainerError};

/// One trainable tensor, f32.
#[derive(Clone, Debug)]
pub struct Parameter {
    name: String,
    var: Var,
    offset: usize,
}

/// All trainable tensors of a model, in the order of their names. Where they stand one after another in a flat vector
/// (gradients, optimizer state), it is in this order.
#[derive(Clone, Debug)]
pub struct Parameters {
    list: Vec<Parameter>,
    elements: usize,
}

/// How a parameter starts.
#[derive(Clone, Copy, Debug)]
enum Start {
    /// All ones: the weights of norms.
    Ones,
    /// Normal with this standard deviation.
    Normal(f32),
}

impl Parameter {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its tensor.
    pub fn var(&self) -> &Var {
        &self.var
    }

    /// The position of its first element in a flat vector of all parameters.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Its number of elements.
    pub fn elements(&self) -> usize {
        self.var.elem_count()
    }

    /// True for matrices; weight decay spares the weights of norms.
    pub fn decays(&self) -> bool {
        self.var.rank() > 1
    }
}

impl Parameters {
    /// Parameters of a new model. The values of each depend on `seed` and its own name only.
    ///
    /// # Errors
    /// [`TrainerError::InvalidConfig`] and the like for a bad configuration.
    pub fn new(config: &ModelConfig, seed: u64) -> Result<Self, TrainerError> {
        config.validate()?;
        let mut list = Vec::new();
        let mut offset = 0;
        for (name, shape, start) in catalogue(config) {
            let elements: usize = shape.iter().product();
            let values = match start {
                Start::Ones => vec![1.0; elements],
                Start::Normal(deviation) => {
                    let mut rng = Rng::new(seed, &name);
                    (0..elements).map(|_| rng.normal() * deviation).collect()
                }
            };
            let var = Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu)?)?;
            list.push(Parameter { name, var, offset });
            offset += elements;
        }
        Ok(Parameters { list, elements: offset })
    }

    /// The parameters in name order.
    pub fn iter(&self) -> std::slice::Iter<'_, Parameter> {
        self.list.iter()
    }

    /// Number of elements of all parameters together.
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// The tensor called `name`.
    ///
    /// # Errors
    /// [`TrainerError::InvalidConfig`] when there is none.
    pub fn get(&self, name: &str) -> Result<&Var, TrainerError> {
        match self.list.binary_search_by(|p| p.name.as_str().cmp(name)) {
            Ok(index) => Ok(&self.list[index].var),
            Err(_) => Err(TrainerError::InvalidConfig {
                field: "parameter",
                value: name.to_string(),
                expected: format!("the model has {} parameters and none of that name", self.list.len()),
            }),
        }
    }
}

impl<'a> IntoIterator for &'a Parameters {
    type Item = &'a Parameter;
    type IntoIter = std::slice::Iter<'a, Parameter>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// Name, shape and start of every parameter, sorted by name. Matrices are `[in, out]`.
fn catalogue(config: &ModelConfig) -> Vec<(String, Vec<usize>, Start)> {
    let ModelConfig { layers, dim, q_heads, kv_heads, head_dim, ffn_dim, vocab, .. } = *config;
    let (q, kv) = (q_heads * head_dim, kv_heads * head_dim);
    let fan_in = |inputs: usize| Start::Normal(1.0 / (inputs as f32).sqrt());
    // What is added to the residual stream starts smaller the more layers add to it.
    let residual = |inputs: usize| Start::Normal(1.0 / (inputs as f32 * 2.0 * layers as f32).sqrt());
    let mut all = vec![
        ("embedding".to_string(), vec![vocab, dim], Start::Normal(0.5)),
        ("head".to_string(), vec![dim, vocab], Start::Normal(0.02)),
        ("norm".to_string(), vec![dim], Start::Ones),
    ];
    for layer in 0..layers {
        let mut add =
            |name: &str, shape: Vec<usize>, start| all.push((layer_name(layer, name), shape, start));
        add("attention.norm", vec![dim], Start::Ones);
        add("attention.q", vec![dim, q], fan_in(dim));
        add("attention.k", vec![dim, kv], fan_in(dim));
        add("attention.v", vec![dim, kv], fan_in(dim));
        add("attention.o", vec![q, dim], residual(q));
        add("mlp.norm", vec![dim], Start::Ones);
        add("mlp.gate_up", vec![dim, 2 * ffn_dim], fan_in(dim));
        add("mlp.down", vec![ffn_dim, dim], residual(ffn_dim));
    }
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

/// The full name of a layer's parameter.
pub(crate) fn layer_name(layer: usize, name: &str) -> String {
    format!("layer.{layer:04}.{name}")
}
