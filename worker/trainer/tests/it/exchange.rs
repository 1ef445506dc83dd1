//! The exchange between ranks: sums, losses, strangers.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use outboard_trainer::{Exchange, ExchangeConfig, ExchangeError};

use crate::support::{as_ranks, exchange_config, listeners};

const LONG: Duration = Duration::from_secs(30);

/// Values whose sum depends on the order of addition.
fn values(rank: usize, count: usize) -> Vec<f32> {
    (0..count)
        .map(|i| ((i * 31 + rank * 17) % 1009) as f32 * 10.0_f32.powi((i + rank) as i32 % 7 - 3))
        .collect()
}

#[test]
fn three_ranks_hold_the_same_sum_in_rank_order() {
    // More than sockets buffer, so that everybody writes while everybody writes.
    let count = 3_000_000;
    let sums = as_ranks(3, LONG, |mut exchange| {
        let mut sum = values(exchange.rank(), count);
        exchange.sum_in_rank_order(&mut sum).unwrap();
        let mut again = values(exchange.rank(), 5);
        exchange.sum_in_rank_order(&mut again).unwrap();
        assert_eq!(again, sum[..5]);
        sum
    });
    let (a, b, c) = (values(0, count), values(1, count), values(2, count));
    for index in 0..count {
        let expected = (a[index] + b[index]) + c[index];
        assert!(sums.iter().all(|sum| sum[index].to_bits() == expected.to_bits()), "element {index}");
    }
}

#[test]
fn gathers_are_by_rank() {
    let gathered = as_ranks(3, LONG, |mut exchange| {
        let rank = exchange.rank() as u64;
        (
            exchange.all_gather_u64(&[rank, rank * 10]).unwrap(),
            exchange.all_gather_f64(&[0.1 * rank as f64]).unwrap(),
        )
    });
    for (counts, fractions) in gathered {
        assert_eq!(counts, [[0, 0], [1, 10], [2, 20]]);
        assert_eq!(fractions, [[0.0], [0.1], [0.2]]);
    }
}

#[test]
fn one_rank_needs_no_one() {
    let mut exchange = Exchange::alone();
    let mut values = vec![1.5, 2.5];
    exchange.sum_in_rank_order(&mut values).unwrap();
    assert_eq!(values, [1.5, 2.5]);
    assert_eq!(exchange.all_gather_u64(&[7]).unwrap(), [[7]]);
}

#[test]
fn a_rank_that_dies_is_named_to_all() {
    let began = Instant::now();
    let errors = as_ranks(3, LONG, |mut exchange| {
        exchange.all_gather_u64(&[1]).unwrap();
        if exchange.rank() == 2 {
            return None;
        }
        let error = exchange.sum_in_rank_order(&mut vec![0.0; 3_000_000]).unwrap_err();
        let after = exchange.all_gather_u64(&[1]).unwrap_err();
        assert!(matches!(after, ExchangeError::Failed), "{after}");
        Some(error)
    });
    for error in errors.into_iter().flatten() {
        assert!(matches!(error, ExchangeError::Lost { rank: 2, .. }), "{error}");
    }
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_rank_that_hangs_is_named_in_time() {
    let began = Instant::now();
    let errors = as_ranks(2, Duration::from_millis(400), |mut exchange| {
        if exchange.rank() == 1 {
            thread::sleep(Duration::from_millis(1500));
            return None;
        }
        Some(exchange.sum_in_rank_order(&mut vec![0.0; 3_000_000]).unwrap_err())
    });
    assert!(matches!(errors[0], Some(ExchangeError::Late { rank: 1, .. })), "{errors:?}");
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[test]
fn ranks_at_different_operations_are_told() {
    let errors = as_ranks(2, LONG, |mut exchange| match exchange.rank() {
        0 => exchange.all_gather_u64(&[1]).map(|_| ()).unwrap_err(),
        _ => exchange.sum_in_rank_order(&mut [0.0; 4]).unwrap_err(),
    });
    for (rank, error) in errors.iter().enumerate() {
        let other = 1 - rank as u32;
        assert!(matches!(error, ExchangeError::OutOfStep { rank, .. } if *rank == other), "{error}");
    }
}

#[test]
fn a_rank_that_never_comes_is_named() {
    let (listeners, addresses) = listeners(3);
    let limit = Duration::from_millis(300);
    let error = Exchange::connect(&exchange_config(0, 3, limit), &listeners[0], &addresses).unwrap_err();
    assert!(matches!(error, ExchangeError::Late { rank: 1, .. }), "{error}");

    // A port that nobody listens on, and one that accepts and says nothing.
    let (silent, mut lower) = self::listeners(1);
    lower.extend(&addresses[1..]);
    let error = Exchange::connect(&exchange_config(1, 3, limit), &listeners[1], &lower).unwrap_err();
    assert!(matches!(error, ExchangeError::Late { rank: 0, .. }), "{error}");
    drop(silent);
    let error = Exchange::connect(&exchange_config(1, 3, limit), &listeners[1], &lower).unwrap_err();
    assert!(
        matches!(error, ExchangeError::Late { rank: 0, .. } | ExchangeError::Lost { rank: 0, .. }),
        "{error}"
    );
}

#[test]
fn strangers_are_refused_and_do_no_harm() {
    let (listeners, addresses) = listeners(2);
    let mut silent = TcpStream::connect(addresses[0]).unwrap();
    let mut babbling = TcpStream::connect(addresses[0]).unwrap();
    babbling.write_all(&[b'x'; 200]).unwrap();
    thread::scope(|scope| {
        let zero = scope.spawn(|| {
            let mut exchange =
                Exchange::connect(&exchange_config(0, 2, LONG), &listeners[0], &addresses).unwrap();
            exchange.all_gather_u64(&[5]).unwrap()
        });
        let refused = |config: ExchangeConfig, addresses: &[_]| {
            let error = Exchange::connect(&config, &listeners[1], addresses).unwrap_err();
            match error {
                ExchangeError::Refused { rank: 0, reason, .. } => reason,
                other => panic!("{other}"),
            }
        };
        let stranger = ExchangeConfig { job: "other".into(), ..exchange_config(1, 2, LONG) };
        assert_eq!(refused(stranger, &addresses), "it belongs to another job");
        let wide = [addresses.clone(), addresses.clone()].concat();
        assert_eq!(refused(exchange_config(1, 4, LONG), &wide), "its job has another number of ranks");

        let mut exchange =
            Exchange::connect(&exchange_config(1, 2, LONG), &listeners[1], &addresses).unwrap();
        assert_eq!(exchange.all_gather_u64(&[6]).unwrap(), [[5], [6]]);
        assert_eq!(zero.join().unwrap(), [[5], [6]]);
    });
    let _ = silent.write_all(b"late");
    silent.set_read_timeout(Some(LONG)).unwrap();
    assert!(!matches!(silent.read(&mut [0; 8]), Ok(1..)), "a stranger was answered");
}

#[test]
fn bad_settings_are_named() {
    let (listeners, addresses) = listeners(2);
    let good = exchange_config(0, 2, LONG);
    let bad = [
        (ExchangeConfig { job: String::new(), ..good.clone() }, "job"),
        (ExchangeConfig { job: "x".repeat(65), ..good.clone() }, "job"),
        (ExchangeConfig { rank: 2, ..good.clone() }, "rank"),
        (ExchangeConfig { ranks: 3, ..good.clone() }, "number of addresses"),
        (ExchangeConfig { timeout: Duration::ZERO, ..good }, "timeout"),
    ];
    for (config, name) in bad {
        let error = Exchange::connect(&config, &listeners[0], &addresses).unwrap_err();
        assert!(matches!(&error, ExchangeError::InvalidConfig { field, .. } if *field == name), "{error}");
    }
}
